"""async-openai, the client of Rust programs, as it comes from crates.io: clients/rust asks, and fails where its types are not met."""

import subprocess
import unittest
from pathlib import Path

from server import Server

ASKS = Path(__file__).resolve().parent / "rust" / "target" / "debug" / "apr-clients"


class Rust(unittest.TestCase):
    def test_async_openai_gets_what_it_expects(self):
        self.assertTrue(ASKS.exists(), "cargo build --manifest-path clients/rust/Cargo.toml makes it, as clients/run does")
        with Server(n_ctx=1024) as server:
            asked = subprocess.run([ASKS, server.url, server.model], capture_output=True, text=True, timeout=60)
        self.assertEqual(asked.returncode, 0, asked.stdout + asked.stderr)


if __name__ == "__main__":
    unittest.main()
