"""An agent at work, in OpenAI's form and in Anthropic's: a system prompt of 6,000 tokens, 12 tools, and 10 turns that stream a call
and take its result of 1,000 to 3,000 tokens. Nearly all that a turn has in common with the one before must come from the prefix cache.
"""

import json
import random
import tempfile
import unittest
import urllib.request
from pathlib import Path

import anthropic
import jsonschema_rs
import openai
from server import Server, one_layer

N_CTX, N_SYSTEM, N_TURN = 40960, 6000, 10
WORDS = "the a file line test build error value list of to in and or reads writes calls must never always first last when".split()
SHAPES = {
    "path": {"type": "string", "maxLength": 20},
    "pattern": {"type": "string", "maxLength": 12},
    "line": {"type": "integer", "minimum": 1, "maximum": 9999},
    "mode": {"enum": ["fast", "slow", "dry-run"]},
    "recursive": {"type": "boolean"},
}
NAMES = ["read_file", "write_file", "edit_file", "list_folder", "find_files", "search_text", "run_command", "run_tests", "git_diff",
         "git_log", "fetch_page", "ask_user"]


def schema(n):
    """The arguments of the n-th tool: two or three of the shapes. Nothing else may be there, so that even noise comes to an end."""
    names = sorted(random.Random(n).sample(sorted(SHAPES), 2 + n % 2))
    return {"type": "object", "properties": {k: SHAPES[k] for k in names}, "required": names, "additionalProperties": False}


TOOLS = {name: schema(n) for n, name in enumerate(NAMES)}


def say(seed, n_token, count):
    """Text of that many tokens, or a few more."""
    words = random.Random(seed)
    text = ""
    while (missing := n_token - count(text)) > 0:
        text += " ".join(words.choice(WORDS) for _ in range(missing)) + ".\n"
    return text


def shared(a, b):
    """Tokens at the beginning of both."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Agent(unittest.TestCase):
    def setUp(self):
        model = Path(self.enterContext(tempfile.TemporaryDirectory())) / "agent.gguf"
        # One layer will do: nearly all the time goes into attention.
        one_layer(model, N_CTX)
        self.server = self.enterContext(Server("--parallel", "2", model=model, n_ctx=N_CTX))
        self.system = say("system", N_SYSTEM, self.count)

    def tokenize(self, **body):
        with urllib.request.urlopen(self.server.url + "/tokenize", json.dumps(body).encode()) as reply:
            return json.load(reply)["tokens"]

    def count(self, text):
        return len(self.tokenize(content=text))

    def result(self, turn):
        return say(turn, 1000 + 2000 * turn // (N_TURN - 1), self.count)

    def check(self, turn, name, arguments, n_cached, n_shared):
        jsonschema_rs.validate(TOOLS[name], arguments)
        if turn > 0:
            self.assertGreaterEqual(n_cached, 0.9 * n_shared, f"turn {turn}")

    def test_in_openai_form(self):
        functions = [{"name": n, "description": f"To {n}.", "parameters": p} for n, p in TOOLS.items()]
        tools = [{"type": "function", "function": f} for f in functions]
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": "Make the tests pass."}]
        options = {"model": "agent", "tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300,
                   "temperature": 1, "stream_options": {"include_usage": True}}
        before = []
        with openai.OpenAI(base_url=self.server.url + "/v1", api_key="none", max_retries=0) as client:
            for turn in range(N_TURN):
                with client.chat.completions.stream(messages=messages, seed=turn, **options) as stream:
                    answer = stream.get_final_completion()
                message, usage = answer.choices[0].message, answer.usage
                call, = message.tool_calls
                prompt = self.tokenize(messages=messages, tools=tools)
                self.assertEqual(usage.prompt_tokens, len(prompt))
                n_cached = usage.prompt_tokens_details.cached_tokens
                self.check(turn, call.function.name, json.loads(call.function.arguments), n_cached, shared(before, prompt))
                before = prompt
                called = {"name": call.function.name, "arguments": call.function.arguments}
                messages.append({"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": called}]})
                messages.append({"role": "tool", "tool_call_id": call.id, "content": self.result(turn)})
        self.assertGreater(len(before), N_SYSTEM + 15_000)

    def test_in_anthropic_form(self):
        tools = [{"name": n, "description": f"To {n}.", "input_schema": p} for n, p in TOOLS.items()]
        messages = [{"role": "user", "content": "Make the tests pass."}]
        options = {"model": "agent", "system": self.system, "tools": tools, "max_tokens": 300,
                   "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
        n_before = 0
        with anthropic.Anthropic(base_url=self.server.url, api_key="none", max_retries=0) as client:
            for turn in range(N_TURN):
                extra = {"temperature": 1, "seed": turn}
                with client.messages.stream(messages=messages, extra_body=extra, **options) as stream:
                    answer = stream.get_final_message()
                call, = [block for block in answer.content if block.type == "tool_use"]
                n_cached = answer.usage.cache_read_input_tokens
                # A conversation that goes on begins with all that was read before.
                self.check(turn, call.name, call.input, n_cached, n_before)
                n_before = answer.usage.input_tokens + n_cached
                result = {"type": "tool_result", "tool_use_id": call.id, "content": self.result(turn)}
                messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        self.assertGreater(n_before, N_SYSTEM + 15_000)


if __name__ == "__main__":
    unittest.main()
