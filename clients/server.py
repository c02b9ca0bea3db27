"""A server for tests with real clients: `apr serve run` on the tiny model of fixtures/, on a port that is free.

    with Server() as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")

`APR` names the program, by default target/debug/apr.
"""

import os
import re
import struct
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "fixtures" / "tiny-qwen3moe.gguf"
APR = os.environ.get("APR", str(ROOT / "target" / "debug" / "apr"))


def with_context(n_ctx, path):
    """Writes a copy of the tiny model that says it was made for contexts of `n_ctx` tokens."""
    content = bytearray(TINY.read_bytes())
    key = b"qwen3moe.context_length"
    value = content.index(key) + len(key)
    kind, _ = struct.unpack_from("<II", content, value)
    assert kind == 4, "GGUF's type for u32"
    struct.pack_into("<I", content, value + 4, n_ctx)
    Path(path).write_bytes(content)


def soon(holds, what, seconds=10):
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


class Server:
    """A server that runs as long as the `with` that it begins. What it writes goes to `log`."""

    def __init__(self, *args, model=TINY, n_ctx=512):
        self.model = Path(model).stem
        self.log = []
        self.command = [APR, "serve", "run", str(model), "--port", "0", "--ctx", str(n_ctx), *args]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        self.url = self._listening()
        # Nobody waits for a server whose stderr is full.
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_):
        """Tells it to stop, and sees that it ends well."""
        self.process.terminate()
        code = self.process.wait(timeout=60)
        self._reader.join()
        self.process.stderr.close()
        assert code == 0, f"the server ended with {code}: {''.join(self.log)}"

    def metric(self, name, **labels):
        """The sum of a measure over all series that have these labels."""
        with urllib.request.urlopen(self.url + "/metrics") as reply:
            lines = reply.read().decode().splitlines()
        series = [line.rsplit(" ", 1) for line in lines if re.match(re.escape(name) + "[{ ]", line)]
        found = [float(value) for head, value in series if all(f'{k}="{v}"' in head for k, v in labels.items())]
        assert found, f"there is no {name} with {labels}"
        return sum(found)

    def idle(self):
        """Waits until nothing is going on, and nothing is held for anybody."""
        names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
        soon(lambda: not any(self.metric(name) for name in names), f"the server is idle by {names}")

    def _listening(self):
        for line in self.process.stderr:
            self.log.append(line)
            if "listening on http" in line:
                return "http" + line.split("listening on http", 1)[1].split()[0]
        raise RuntimeError(f"{' '.join(self.command)} does not listen: {''.join(self.log)}")
