"""Anthropic's own client, as it comes from PyPI, with a model of random weights."""

import asyncio
import unittest

import anthropic
from pydantic import BaseModel, ConfigDict, Field
from server import Server

HELLO = [{"role": "user", "content": "Hello there"}]


class Closed(BaseModel):
    """Without room for fields that noise would make up until the limit ends it."""

    model_config = ConfigDict(extra="forbid")


class Person(Closed):
    name: str = Field(min_length=1, max_length=8)
    age: int = Field(ge=0, le=130)


class Number(Closed):
    n: int = Field(ge=0, le=99)


KINDS = {"remember": Person, "count": Number}
TOOLS = [{"name": n, "description": f"To {n}.", "input_schema": kind.model_json_schema()} for n, kind in KINDS.items()]


class Anthropic(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(Server(n_ctx=2048))
        cls.client = cls.enterClassContext(cls.new_client(anthropic.Anthropic))

    @classmethod
    def new_client(cls, kind):
        return kind(base_url=cls.server.url, api_key="none", max_retries=0, timeout=30)

    def options(self, **options):
        extra = {"ignore_eos": True, "seed": 7, "temperature": 1, "top_k": 40} | options.pop("extra_body", {})
        return {"model": self.server.model, "max_tokens": 12, "messages": HELLO, "extra_body": extra, **options}

    def ask(self, **options):
        return self.client.messages.create(**self.options(**options))

    def test_a_message(self):
        answer = self.ask(system="Be brief.")
        self.assertEqual((answer.type, answer.role, answer.model), ("message", "assistant", self.server.model))
        self.assertEqual((answer.stop_reason, answer.usage.output_tokens), ("max_tokens", 12))
        self.assertEqual([b.type for b in answer.content], ["text"])
        counted = self.client.messages.count_tokens(model=self.server.model, messages=HELLO, system="Be brief.")
        read = answer.usage.input_tokens + answer.usage.cache_read_input_tokens
        self.assertEqual(counted.input_tokens, read)
        self.assertEqual(self.ask(system="Be brief.").content, answer.content)

    def test_a_stream(self):
        with self.client.messages.stream(**self.options()) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        whole = self.ask()
        self.assertEqual((text, final.content[0].text), (whole.content[0].text,) * 2)
        self.assertEqual((final.stop_reason, final.usage.output_tokens), ("max_tokens", 12))
        kinds = [e.type for e in self.ask(stream=True) if e.type != "ping"]
        self.assertEqual(kinds[:2], ["message_start", "content_block_start"])
        self.assertEqual(kinds[-3:], ["content_block_stop", "message_delta", "message_stop"])
        self.assertEqual(set(kinds[2:-3]), {"content_block_delta"})

    def test_stop_sequences(self):
        text = self.ask(max_tokens=30).content[0].text
        stop = next(part for part in (text[i:i + 3] for i in range(1, len(text))) if part.isascii())
        answer = self.ask(max_tokens=30, stop_sequences=[stop])
        self.assertEqual((answer.stop_reason, answer.stop_sequence), ("stop_sequence", stop))
        self.assertEqual(answer.content[0].text, text[:text.index(stop)])

    def test_an_answer_is_continued(self):
        answer = self.ask(messages=[*HELLO, {"role": "assistant", "content": "Once upon"}])
        self.assertEqual(answer.usage.output_tokens, 12)

    def test_tools(self):
        options = {"tools": TOOLS, "max_tokens": 400}
        choice = {"type": "any", "disable_parallel_tool_use": True}
        for seed in range(3):
            answer = self.ask(**options, tool_choice=choice, extra_body={"seed": seed, "ignore_eos": False})
            self.assertEqual(answer.stop_reason, "tool_use")
            call, = [b for b in answer.content if b.type == "tool_use"]
            KINDS[call.name].model_validate(call.input)
        choice = {"type": "tool", "name": "remember", "disable_parallel_tool_use": True}
        options |= {"tool_choice": choice, "extra_body": {"ignore_eos": False}}
        call, = [b for b in self.ask(**options).content if b.type == "tool_use"]
        with self.client.messages.stream(**self.options(**options)) as stream:
            events = list(stream)
            final = stream.get_final_message()
        streamed, = [b for b in final.content if b.type == "tool_use"]
        self.assertEqual((final.stop_reason, streamed.name, streamed.input), ("tool_use", call.name, call.input))
        Person.model_validate(streamed.input)
        self.assertTrue([e for e in events if e.type == "input_json"])
        # The client takes the call and its result back into the conversation.
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "done"}]}
        follow = self.ask(messages=[*HELLO, {"role": "assistant", "content": [call.model_dump()]}, result], tools=TOOLS)
        self.assertEqual(follow.usage.output_tokens, 12)

    def test_eight_at_once_are_answered_as_one_alone(self):
        messages = [[{"role": "user", "content": "Tell me " + "more and " * (5 * i) + "more."}] for i in range(8)]
        alone = [self.ask(messages=m).content for m in messages]

        async def together():
            async with self.new_client(anthropic.AsyncAnthropic) as client:
                return await asyncio.gather(*[client.messages.create(**self.options(messages=m)) for m in messages])

        self.assertEqual([a.content for a in asyncio.run(together())], alone)

    def test_who_leaves_frees_the_place(self):
        before = self.server.metric("apr_requests_cancelled_total")
        with self.client.messages.stream(**self.options(max_tokens=1500)) as stream:
            next(iter(stream.text_stream))
        self.server.idle()
        self.assertEqual(self.server.metric("apr_requests_cancelled_total"), before + 1)

    def test_errors_are_those_of_the_client(self):
        for kind, type_, options in [
            (anthropic.NotFoundError, "not_found_error", {"model": "claude-9"}),
            (anthropic.BadRequestError, "invalid_request_error", {"messages": []}),
            (anthropic.BadRequestError, "invalid_request_error", {"extra_body": {"temperature": -1}}),
            (anthropic.BadRequestError, "invalid_request_error", {"messages": [{"role": "wizard", "content": "hi"}]}),
            (anthropic.BadRequestError, "invalid_request_error", {"messages": [{"role": "user", "content": "a b " * 4000}]}),
            (anthropic.BadRequestError, "invalid_request_error", {"tools": [{"name": "", "input_schema": {}}]}),
        ]:
            with self.assertRaises(kind) as e:
                self.ask(**options)
            self.assertEqual(e.exception.body["error"]["type"], type_)
            self.assertTrue(e.exception.request_id)


if __name__ == "__main__":
    unittest.main()
