"""OpenAI's own client, as it comes from PyPI, with a model of random weights: what it says is noise, so that whatever has a form
was given it by the server.
"""

import asyncio
import json
import math
import random
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
from pydantic import BaseModel, ConfigDict, Field
from server import Server

HELLO = [{"role": "user", "content": "Hello there"}]
# Runs to its last token, whatever the model would rather do.
ON = {"extra_body": {"ignore_eos": True}, "temperature": 1}


class Closed(BaseModel):
    """Without room for fields that noise would make up until the limit ends it."""

    model_config = ConfigDict(extra="forbid")


class Person(Closed):
    name: str = Field(min_length=1, max_length=8)
    age: int = Field(ge=0, le=130)
    mood: Literal["good", "bad"]


class Paint(Closed):
    """Paints a wall."""

    color: Literal["red", "green", "blue"]
    n_coats: int = Field(ge=1, le=9)


class OpenAi(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(Server(n_ctx=2048))
        cls.client = cls.enterClassContext(cls.new_client(openai.OpenAI))

    @classmethod
    def new_client(cls, kind):
        return kind(base_url=cls.server.url + "/v1", api_key="none", max_retries=0, timeout=30)

    def chat(self, **options):
        options = {"model": self.server.model, "messages": HELLO, "max_tokens": 12, "seed": 7, **ON, **options}
        return self.client.chat.completions.create(**options)

    # ---- what there is

    def test_models(self):
        self.assertEqual([m.id for m in self.client.models.list()], [self.server.model])
        self.assertEqual(self.client.models.retrieve(self.server.model).id, self.server.model)
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("gpt-9")

    # ---- chats

    def test_a_chat(self):
        answer = self.chat()
        self.assertEqual((answer.object, answer.model), ("chat.completion", self.server.model))
        self.assertEqual((answer.choices[0].finish_reason, answer.choices[0].message.role), ("length", "assistant"))
        self.assertEqual((answer.usage.completion_tokens, answer.usage.total_tokens), (12, answer.usage.prompt_tokens + 12))
        self.assertEqual(self.chat().choices[0].message.content, answer.choices[0].message.content)
        self.assertNotEqual(self.chat(seed=8).choices[0].message.content, answer.choices[0].message.content)
        self.assertEqual(self.chat(max_tokens=None, max_completion_tokens=3).usage.completion_tokens, 3)

    def test_a_chat_streams(self):
        chunks = list(self.chat(stream=True, stream_options={"include_usage": True}))
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual(len({c.id for c in chunks}), 1)
        self.assertEqual(chunks[-1].choices, [])
        whole = self.chat()
        self.assertEqual(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)
        choices = [c.choices[0] for c in chunks[:-1]]
        self.assertEqual("".join(c.delta.content or "" for c in choices), whole.choices[0].message.content)
        self.assertEqual([c.finish_reason for c in choices if c.finish_reason], ["length"])
        self.assertFalse(any(c.usage for c in self.chat(stream=True)))

    def test_the_stream_helper(self):
        options = {"model": self.server.model, "messages": HELLO, "max_tokens": 12, "seed": 7, **ON}
        with self.client.chat.completions.stream(**options) as stream:
            text = "".join(e.delta for e in stream if e.type == "content.delta")
            # The client's final completion is none when the limit ends it.
            final = stream.current_completion_snapshot
        self.assertEqual(text, final.choices[0].message.content)
        self.assertEqual(text, self.chat().choices[0].message.content)

    def test_several_answers(self):
        answer = self.chat(n=3)
        self.assertEqual([c.index for c in answer.choices], [0, 1, 2])
        texts = [c.message.content for c in answer.choices]
        self.assertEqual(len(set(texts)), 3)
        self.assertEqual(answer.usage.completion_tokens, 36)
        streamed = [""] * 3
        for chunk in self.chat(n=3, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        self.assertEqual(streamed, texts)

    def test_logprobs(self):
        tokens = self.chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
        self.assertEqual(len(tokens), 12)
        for token in tokens:
            best = [t.logprob for t in token.top_logprobs]
            self.assertEqual((len(best), best), (3, sorted(best, reverse=True)))
            self.assertLessEqual(token.logprob, best[0])
        streamed = [t for c in self.chat(logprobs=True, top_logprobs=3, stream=True) for choice in c.choices if choice.logprobs
                    for t in choice.logprobs.content]
        self.assertEqual(streamed, tokens)

    def test_stop(self):
        text = self.chat(max_tokens=30).choices[0].message.content
        stop = next(part for part in (text[i:i + 3] for i in range(1, len(text))) if part.isascii())
        choice = self.chat(max_tokens=30, stop=[stop]).choices[0]
        self.assertEqual((choice.finish_reason, choice.message.content), ("stop", text[:text.index(stop)]))
        streamed = "".join(c.choices[0].delta.content or "" for c in self.chat(max_tokens=30, stop=stop, stream=True))
        self.assertEqual(streamed, text[:text.index(stop)])

    def test_logit_bias(self):
        token = self.chat(logprobs=True, max_tokens=1, temperature=0, logit_bias={"1000": 100}).choices[0].logprobs.content[0]
        again = self.chat(logprobs=True, max_tokens=5, temperature=0, logit_bias={"1000": 100}).choices[0].message.content
        self.assertEqual(again, token.token * 5)
        self.assertNotEqual(self.chat(max_tokens=5, temperature=0, logit_bias={"1000": -100}).choices[0].message.content, again)

    def test_completions(self):
        options = {"model": self.server.model, "prompt": ["One", "Two"], "max_tokens": 6, "seed": 7, **ON}
        answer = self.client.completions.create(**options, logprobs=2)
        self.assertEqual([c.index for c in answer.choices], [0, 1])
        self.assertEqual(len(answer.choices[0].logprobs.token_logprobs), 6)
        texts = ["", ""]
        for chunk in self.client.completions.create(**options, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        self.assertEqual(texts, [c.text for c in answer.choices])
        echo = self.client.completions.create(**options | {"prompt": "One", "echo": True})
        self.assertEqual(echo.choices[0].text, "One" + texts[0])

    def test_a_text_is_scored(self):
        """As evaluations do it: the prompt again with its logprobs, and an answer that is dropped or none."""
        options = {"model": self.server.model, "prompt": ["One and two", "Two"], "echo": True, "logprobs": 1, **ON}
        scored = self.client.completions.create(**options, max_tokens=0)
        self.assertEqual([c.text for c in scored.choices], options["prompt"])
        for choice, more in zip(scored.choices, self.client.completions.create(**options, max_tokens=1).choices):
            columns = choice.logprobs
            self.assertIsNone(columns.token_logprobs[0])
            self.assertTrue(all(p <= max(best.values()) for p, best in zip(columns.token_logprobs[1:], columns.top_logprobs[1:])))
            self.assertEqual(more.logprobs.token_logprobs[:-1], columns.token_logprobs)
            self.assertEqual(more.logprobs.text_offset[-1], len(choice.text))

    # ---- forms

    def test_an_answer_is_parsed(self):
        options = {"model": self.server.model, "messages": HELLO, "max_tokens": 200, "temperature": 1, "response_format": Person}
        for seed in range(3):
            choice = self.client.chat.completions.parse(**options, seed=seed).choices[0]
            self.assertIsInstance(choice.message.parsed, Person)
            self.assertEqual(choice.message.content, choice.message.parsed.model_dump_json())
        with self.client.chat.completions.stream(**options, seed=0) as stream:
            self.assertIsInstance(stream.get_final_completion().choices[0].message.parsed, Person)

    def test_tools(self):
        tools = [openai.pydantic_function_tool(Paint), openai.pydantic_function_tool(Person)]
        options = {"model": self.server.model, "messages": HELLO, "max_tokens": 400, "temperature": 1, "tools": tools,
                   "parallel_tool_calls": False}
        kinds = {"Paint": Paint, "Person": Person}
        for seed in range(4):
            choice = self.client.chat.completions.parse(**options, seed=seed, tool_choice="required").choices[0]
            self.assertEqual(choice.finish_reason, "tool_calls")
            self.assertEqual(choice.message.content, None)
            call, = choice.message.tool_calls
            self.assertIsInstance(call.function.parsed_arguments, kinds[call.function.name])
        paint = {"type": "function", "function": {"name": "Paint"}}
        call, = self.chat(max_tokens=400, tools=tools, tool_choice=paint, parallel_tool_calls=False).choices[0].message.tool_calls
        Paint.model_validate_json(call.function.arguments)

    def test_calls_of_tools_stream(self):
        tools = [openai.pydantic_function_tool(Paint), openai.pydantic_function_tool(Person)]
        options = {"max_tokens": 400, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
        whole, = self.chat(**options).choices[0].message.tool_calls
        name, arguments, ids, reasons = "", "", set(), []
        for chunk in self.chat(**options, stream=True):
            choice = chunk.choices[0]
            reasons.append(choice.finish_reason)
            self.assertFalse(choice.delta.content)
            for call in choice.delta.tool_calls or []:
                self.assertEqual(call.index, 0)
                ids.add(call.id)
                name += call.function.name or ""
                arguments += call.function.arguments or ""
        self.assertEqual((name, arguments), (whole.function.name, whole.function.arguments))
        self.assertEqual((reasons[-1], len(ids - {None})), ("tool_calls", 1))

    # ---- responses

    def test_responses(self):
        options = {"model": self.server.model, "input": "Hello there", "max_output_tokens": 16, **ON}
        answer = self.client.responses.create(**options, instructions="Be brief.", store=False)
        self.assertEqual((answer.status, answer.incomplete_details.reason), ("incomplete", "max_output_tokens"))
        self.assertEqual(answer.usage.output_tokens, 16)
        self.assertTrue(answer.output_text)
        parsed = self.client.responses.parse(model=self.server.model, input="Hi", text_format=Person, max_output_tokens=200)
        self.assertEqual(parsed.status, "completed")
        self.assertIsInstance(parsed.output_parsed, Person)

    def test_responses_stream(self):
        options = {"model": self.server.model, "input": "Hello there", "max_output_tokens": 16, "temperature": 0,
                   "extra_body": ON["extra_body"]}
        events = list(self.client.responses.create(**options, stream=True))
        kinds = [e.type for e in events]
        self.assertEqual((kinds[0], kinds[-1]), ("response.created", "response.incomplete"))
        self.assertEqual([e.sequence_number for e in events], list(range(len(events))))
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        self.assertEqual(text, events[-1].response.output_text)
        self.assertEqual(text, self.client.responses.create(**options).output_text)
        with self.client.responses.stream(**options) as stream:
            self.assertEqual("".join(e.delta for e in stream if e.type == "response.output_text.delta"), text)

    def test_responses_call_tools(self):
        tool = {"type": "function", "name": "Paint", "parameters": Paint.model_json_schema(), "strict": False}
        options = {"model": self.server.model, "input": "Hi", "tools": [tool], "tool_choice": "required",
                   "parallel_tool_calls": False, "max_output_tokens": 400}
        answer = self.client.responses.create(**options)
        call, = [item for item in answer.output if item.type == "function_call"]
        Paint.model_validate_json(call.arguments)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
        history = [{"role": "user", "content": "Hi"}, *answer.output, result]
        following = self.client.responses.create(model=self.server.model, input=history, max_output_tokens=16, **ON)
        counted = self.client.responses.input_tokens.count(model=self.server.model, input=history)
        self.assertEqual(following.usage.input_tokens, counted.input_tokens)
        self.assertGreater(counted.input_tokens, self.client.responses.input_tokens.count(input="Hi").input_tokens)

    # ---- embeddings

    def test_embeddings(self):
        options = {"model": self.server.model, "input": ["A cat.", "A dog, which is longer.", "A cat."]}
        # Without a format the client asks for base64 and unpacks it.
        packed, plain = (self.client.embeddings.create(**options, **f).data for f in ({}, {"encoding_format": "float"}))
        self.assertEqual([e.index for e in packed], [0, 1, 2])
        for a, b in zip(packed, plain):
            self.assertAlmostEqual(math.hypot(*a.embedding), 1, places=5)
            self.assertLess(max(abs(x - y) for x, y in zip(a.embedding, b.embedding, strict=True)), 1e-6)
        self.assertEqual(packed[0].embedding, packed[2].embedding)
        self.assertNotEqual(packed[0].embedding, packed[1].embedding)

    # ---- faults

    def test_errors_are_those_of_the_client(self):
        chat = self.chat
        for kind, status, ask in [
            (openai.NotFoundError, 404, lambda: chat(model="gpt-9")),
            (openai.BadRequestError, 400, lambda: chat(temperature=-1)),
            (openai.BadRequestError, 400, lambda: chat(messages=[])),
            (openai.BadRequestError, 400, lambda: chat(messages=[{"role": "user", "content": "a b " * 4000}])),
            (openai.BadRequestError, 400, lambda: chat(messages=[{"role": "wizard", "content": "hi"}])),
            (openai.BadRequestError, 400, lambda: chat(stop=["x"] * 20)),
            (openai.BadRequestError, 400, lambda: self.client.embeddings.create(model=self.server.model, input="")),
            (openai.NotFoundError, 404, lambda: self.client.post("/nothing", cast_to=object)),
        ]:
            with self.assertRaises(kind) as e:
                ask()
            self.assertEqual(e.exception.status_code, status)
            self.assertTrue(e.exception.body["message"])
        self.assertEqual(self.failure(messages=[{"role": "user", "content": "a b " * 4000}]).code, "context_length_exceeded")
        self.assertEqual(self.failure(temperature=-1).param, "temperature")

    def failure(self, **options):
        with self.assertRaises(openai.APIStatusError) as e:
            self.chat(**options)
        return e.exception

    # ---- many at once, and those that leave

    def test_eight_at_once_are_answered_as_one_alone(self):
        messages = [[{"role": "user", "content": "Tell me about " + "this and " * (7 * i) + "that."}] for i in range(8)]
        alone = [self.chat(messages=m, seed=i, max_tokens=24).choices[0].message.content for i, m in enumerate(messages)]

        async def together():
            async with self.new_client(openai.AsyncOpenAI) as client:
                options = {"model": self.server.model, "max_tokens": 24, **ON}
                asked = [client.chat.completions.create(messages=m, seed=i, **options) for i, m in enumerate(messages)]
                return [a.choices[0].message.content for a in await asyncio.gather(*asked)]

        self.assertEqual(asyncio.run(together()), alone)

    def test_who_leaves_frees_the_place(self):
        before = self.server.metric("apr_requests_cancelled_total")
        with self.chat(stream=True, max_tokens=1500) as stream:
            for _, chunk in zip(range(4), stream):
                self.assertTrue(chunk.choices)
        self.server.idle()
        self.assertEqual(self.server.metric("apr_requests_cancelled_total"), before + 1)

    def test_two_hundred_leave_at_any_point(self):
        """Cut off while they wait, are read, or are answered, with or without a stream."""
        begun = self.server.metric("apr_requests_cancelled_total")
        luck = random.Random(1)
        asked = [(i, luck.random() < 0.5, luck.random() ** 2 * 0.4, luck.randrange(400)) for i in range(200)]
        local = threading.local()
        clients = []

        def leave(asked):
            i, streams, seconds, n_words = asked
            if not hasattr(local, "client"):
                local.client = self.new_client(openai.OpenAI)
                clients.append(local.client)
            options = {"model": self.server.model, "max_tokens": 1000, "seed": i, "stream": streams, **ON}
            messages = [{"role": "user", "content": f"{i} " + "word " * n_words}]
            try:
                answer = local.client.chat.completions.create(messages=messages, timeout=max(seconds, 0.001), **options)
                if streams:
                    with answer:
                        for _ in zip(range(i % 7), answer):
                            pass
            except openai.APITimeoutError:
                pass

        with ThreadPoolExecutor(24) as pool:
            list(pool.map(leave, asked))
        for client in clients:
            client.close()
        self.server.idle()
        self.assertGreater(self.server.metric("apr_requests_cancelled_total") - begun, 100)
        self.assertEqual(self.chat().usage.completion_tokens, 12)


if __name__ == "__main__":
    unittest.main()
