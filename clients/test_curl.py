"""The command that introduces the server, as people type it: curl says of its JSON that it is a form."""

import json
import subprocess
import tempfile
import unittest
from pathlib import Path

from server import TINY, Server


class Curl(unittest.TestCase):
    def test_a_chat(self):
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "qwen3-coder.gguf"
            model.symlink_to(TINY)
            with Server(model=model) as server:
                body = '{"model":"qwen3-coder","messages":[{"role":"user","content":"Write a haiku"}],"max_tokens":20}'
                command = ["curl", "--silent", "--show-error", "--fail-with-body", server.url + "/v1/chat/completions", "-d", body]
                answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                self.assertEqual(answer["model"], "qwen3-coder")
                self.assertTrue(answer["choices"][0]["message"]["content"])
                command[-1] = body[:-1] + ',"stream":true}'
                streamed = subprocess.run([*command, "--no-buffer"], check=True, capture_output=True, text=True).stdout
                self.assertTrue(streamed.endswith("data: [DONE]\n\n"), streamed)


if __name__ == "__main__":
    unittest.main()
