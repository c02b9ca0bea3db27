"""A server for tests with real clients: `apr serve run` on the tiny model of fixtures/, on a port that is free.

    with Server() as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")

`APR` names the program, by default target/debug/apr.
"""

import os
import subprocess
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "fixtures" / "tiny-qwen3moe.gguf"
APR = os.environ.get("APR", str(ROOT / "target" / "debug" / "apr"))


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

    def _listening(self):
        for line in self.process.stderr:
            self.log.append(line)
            if "listening on http" in line:
                return "http" + line.split("listening on http", 1)[1].split()[0]
        raise RuntimeError(f"{' '.join(self.command)} does not listen: {''.join(self.log)}")
