"""Ollama's own client, as it comes from PyPI, with a model of random weights."""

import asyncio
import math
import unittest

import ollama
from pydantic import BaseModel, ConfigDict, Field
from server import Server

HELLO = [{"role": "user", "content": "Hello there"}]


class Person(BaseModel):
    """Without room for fields that noise would make up until the limit ends it."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=8)
    age: int = Field(ge=0, le=130)


def paint(color: str, coats: int) -> str:
    """Paints a wall.

    Args:
      color: the color
      coats: how many
    """
    return f"{coats} coats of {color}"


class Ollama(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(Server(n_ctx=1024))
        cls.client = ollama.Client(host=cls.server.url)
        cls.addClassCleanup(cls.client._client.close)

    @staticmethod
    def options(**options):
        return {"num_predict": 12, "seed": 7, "temperature": 1, **options}

    def chat(self, **fields):
        return self.client.chat(**{"model": self.server.model, "messages": HELLO, "options": self.options(), **fields})

    def generate(self, **fields):
        return self.client.generate(**{"model": self.server.model, "prompt": "Once", "options": self.options(), **fields})

    def test_a_chat(self):
        answer = self.chat()
        self.assertEqual((answer.model, answer.message.role, answer.done), (self.server.model, "assistant", True))
        self.assertIn(answer.done_reason, ("length", "stop"))
        self.assertGreater(answer.prompt_eval_count, 0)
        self.assertTrue(0 < answer.eval_count <= 12)
        parts = list(self.chat(stream=True))
        self.assertEqual("".join(p.message.content or "" for p in parts), answer.message.content)
        self.assertEqual([p.done for p in parts], [False] * (len(parts) - 1) + [True])
        self.assertEqual(parts[-1].eval_count, answer.eval_count)

    def test_a_text(self):
        for fields in ({}, {"system": "Be brief."}, {"raw": True}):
            answer = self.generate(**fields)
            parts = list(self.generate(**fields, stream=True))
            self.assertEqual("".join(p.response for p in parts), answer.response)
            self.assertTrue(parts[-1].done)

    def test_a_form(self):
        options = self.options(num_predict=200)
        for seed in range(3):
            text = self.chat(format=Person.model_json_schema(), options=options | {"seed": seed}).message.content
            Person.model_validate_json(text)
        Person.model_validate_json(self.generate(format=Person.model_json_schema(), options=options).response)
        streamed = "".join(p.message.content for p in self.chat(format=Person.model_json_schema(), options=options, stream=True))
        Person.model_validate_json(streamed)

    def test_tools_are_told(self):
        told = self.chat(tools=[paint])
        self.assertGreater(told.prompt_eval_count, self.chat().prompt_eval_count)
        call = {"function": {"name": "paint", "arguments": {"color": "red", "coats": 2}}}
        history = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]},
                   {"role": "tool", "tool_name": "paint", "content": paint("red", 2)}]
        self.assertGreater(self.chat(messages=history, tools=[paint]).prompt_eval_count, told.prompt_eval_count)

    def test_embed(self):
        answer = self.client.embed(model=self.server.model, input=["A cat.", "A dog, which is longer.", "A cat."])
        self.assertEqual(len(answer.embeddings), 3)
        for vector in answer.embeddings:
            self.assertAlmostEqual(math.hypot(*vector), 1, places=5)
        self.assertEqual(answer.embeddings[0], answer.embeddings[2])
        one = self.client.embeddings(model=self.server.model, prompt="A cat.").embedding
        self.assertLess(max(abs(a - b) for a, b in zip(one, answer.embeddings[0], strict=True)), 1e-6)

    def test_what_there_is(self):
        listed, = self.client.list().models
        self.assertEqual(listed.model.split(":")[0], self.server.model)
        self.assertGreater(listed.size, 1_000_000)
        shown = self.client.show(listed.model)
        self.assertEqual(shown.modelinfo["general.architecture"], "qwen3moe")
        self.assertIn("completion", shown.capabilities)
        running, = self.client.ps().models
        self.assertEqual(running.model, listed.model)
        # A client asks by the name that the list gave it.
        self.assertTrue(self.chat(model=listed.model).done)

    def test_eight_at_once_are_answered_as_one_alone(self):
        messages = [[{"role": "user", "content": "Tell me " + "more and " * (5 * i) + "more."}] for i in range(8)]
        alone = [self.chat(messages=m).message.content for m in messages]

        async def together():
            client = ollama.AsyncClient(host=self.server.url)
            options = {"model": self.server.model, "options": self.options()}
            answers = await asyncio.gather(*[client.chat(messages=m, **options) for m in messages])
            await client._client.aclose()
            return [a.message.content for a in answers]

        self.assertEqual(asyncio.run(together()), alone)

    def test_errors_are_those_of_the_client(self):
        for status, ask in [
            (404, lambda: self.chat(model="llama-9")),
            (404, lambda: self.client.show("llama-9")),
            (400, lambda: self.chat(options={"temperature": -1})),
            (400, lambda: self.generate(options={"num_ctx": 1 << 20})),
            (400, lambda: self.chat(messages=[{"role": "user", "content": "a b " * 4000}])),
        ]:
            with self.assertRaises(ollama.ResponseError) as e:
                ask()
            self.assertEqual(e.exception.status_code, status)
            self.assertTrue(e.exception.error)


if __name__ == "__main__":
    unittest.main()
