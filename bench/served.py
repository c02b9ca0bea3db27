"""A server that bench/serve-soak and bench/serve-storm begin, and what it says of itself."""

import http.client
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

APR = str(Path(__file__).resolve().parent.parent / "target" / "release" / "apr")


class Server:
    def __init__(self, apr, model, n_ctx):
        command = [apr, "serve", "run", model, "--port", "0", "--ctx", str(n_ctx), "-q"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"listening on http://([^\s]+)", line):
                self.address = found[1]
                break
        else:
            sys.exit("the server does not listen")
        # Nobody waits for a server whose stderr is full.
        threading.Thread(target=lambda: [None for _ in self.process.stderr], daemon=True).start()

    def rss_mib(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def n_open(self):
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def metric(self, name):
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return sum(float(v) for v in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.M))

    def at_rest(self):
        """Open files of a server that nobody asks: what was left last is let go of within a step."""
        self.metric("vllm:num_requests_running")
        time.sleep(2)
        return self.n_open()

    def left(self, n_open_before):
        """What runs, waits or is open, where nothing should be."""
        n_open = self.at_rest()
        out = {name: self.metric(f"vllm:num_requests_{name}") for name in ("running", "waiting")}
        return {**out, "files": max(0, n_open - n_open_before), "kv blocks": self.metric("vllm:kv_cache_usage_perc")}
