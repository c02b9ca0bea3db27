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


def one_layer(path, n_ctx):
    """Writes a copy of the tiny model that has only its first layer, and says that it was made for contexts of `n_ctx` tokens."""
    old = TINY.read_bytes()
    # A tensor is described by its name with the length before it, its sizes with their number, its type, and where its data is.
    names = [m for m in re.finditer(rb"[a-z0-9_.]+\.weight", old) if old[m.start() - 8:m.start()] == struct.pack("<Q", len(m[0]))]
    n_tensor, = struct.unpack_from("<Q", old, 8)
    assert len(names) == n_tensor, f"{len(names)} of {n_tensor} tensors found"
    infos = [old[m.start() - 8:m.end() + 16 + 8 * old[m.end()]] for m in names]
    kept = [info for info, m in zip(infos, names) if not re.match(rb"blk\.[1-9]", m[0])]
    begin = names[0].start() - 8
    head = bytearray(old[:begin])
    struct.pack_into("<Q", head, 8, len(kept))
    for name, number in [("context_length", n_ctx), ("block_count", 1)]:
        key = f"qwen3moe.{name}".encode()
        value = head.index(key) + len(key)
        assert struct.unpack_from("<I", head, value) == (4,), f"{name} is a u32"
        struct.pack_into("<I", head, value + 4, number)
    # Data begins at the next multiple of GGUF's alignment.
    new = bytes(head) + b"".join(kept)
    data = begin + sum(map(len, infos))
    Path(path).write_bytes(new + bytes(-len(new) % 32) + old[data + -data % 32:])


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
