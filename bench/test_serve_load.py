"""Tests of bench/serve-load against a server of a few lines: what it asks, what it times, and what it keeps."""

import json
import tempfile
import threading
import time
import unittest
import unittest.mock
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import loads
from test_bench import script

serve_load = script("serve-load")


class Handler(BaseHTTPRequestHandler):
    """Streams two tokens, the first after 20 ms; a prompt that ends in "fail" breaks off."""

    asked = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.asked.append((time.monotonic(), body))
        self.send_response(400 if body["prompt"] == "refuse" else 200)
        self.end_headers()
        self.wfile.write(b": keep-alive\n\n")
        self.wfile.flush()
        time.sleep(0.02)
        events = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, {"choices": [], "usage": {"completion_tokens": 2}}]
        if body["prompt"].endswith("fail"):
            events = [{"error": {"message": "broken"}}]
        for event in events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


class Scenarios(unittest.TestCase):
    def setUp(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        Handler.asked = []
        self.client = serve_load.Client(f"http://127.0.0.1:{self.server.server_port}", 1, 5)

    def tearDown(self):
        self.server.shutdown()
        self.server.server_close()

    def measure(self, *names):
        with unittest.mock.patch.object(serve_load, "say"):
            out = serve_load.measure(self.client, names)
        return out, [(at, body["prompt"].split()) for at, body in Handler.asked[1:]]

    def test_first_tokens_are_no_comments(self):
        out, asked = self.measure("alone")
        self.assertGreaterEqual(out["alone"]["first_s"], 0.02)
        self.assertEqual([len(words) for _, words in asked], [64])
        self.assertTrue(Handler.asked[1][1]["ignore_eos"])

    def test_behind_begins_a_second_later(self):
        out, asked = self.measure("behind")
        self.assertEqual([len(words) for _, words in asked], [1500, 64])
        self.assertGreaterEqual(asked[1][0] - asked[0][0], 0.99)
        self.assertLess(out["behind"]["first_s"], 0.9, "it is timed from its own beginning")

    def test_clients_are_together_and_differ(self):
        out, asked = self.measure("clients4")
        self.assertEqual(len({tuple(words) for _, words in asked}), 4)
        self.assertGreater(out["clients4"]["tok_per_s"], 0)
        self.assertLess(out["clients4"]["tok_per_s"], 8 / 0.02)

    def test_prefixes_are_shared_and_the_seven_wait_for_the_first(self):
        out, asked = self.measure("shared")
        self.assertEqual(len({tuple(words[:1500]) for _, words in asked}), 1)
        self.assertEqual(len({tuple(words) for _, words in asked}), 8)
        self.assertGreaterEqual(asked[1][0] - asked[0][0], 0.02)
        self.assertEqual(set(out["shared"]), {"first_s", "rest_s"})

    def test_warm_asks_the_same_again(self):
        _, asked = self.measure("warm")
        self.assertEqual(sorted(words for _, words in asked[:8]), sorted(words for _, words in asked[8:]))

    def test_failures_are_told(self):
        for prompt, told in [("refuse", "answered 400"), ("fail", "broke off")]:
            with self.assertRaisesRegex(serve_load.Failed, told):
                self.client.together([prompt, "fine"], 2)


class Rows(unittest.TestCase):
    about = {"model": "m", "threads": 2, "date": "2026-01-31T10:00:00Z"}

    def test_medians_and_times(self):
        ours = [{"alone": {"first_s": s}, "clients8": {"tok_per_s": r}} for s, r in [(1, 30), (3, 50), (2, 40)]]
        theirs = [{"alone": {"first_s": 4}, "clients8": {"tok_per_s": 10}}] * 3
        alone, clients = loads.make_rows(self.about, ours, theirs)
        self.assertEqual((alone["apr"], alone["peer"], alone["times"]), (2, 4, 2))
        self.assertEqual((clients["apr"], clients["times"], clients["apr_runs"]), (40, 4, [30, 50, 40]))

    def test_newer_rows_replace_older_and_the_page_has_the_table(self):
        row = lambda scenario, apr: loads.make_rows(self.about, [{scenario: {"first_s": apr}}], [{scenario: {"first_s": 9}}])
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "page.md"
            page.write_text(f"before\n{loads.BEGIN}\nold\n{loads.END}\nafter\n")
            for made in (row("behind", 1), row("alone", 2), row("behind", 3)):
                path = loads.keep(made, Path(folder) / "serve", page)
            kept = json.loads(path.read_text())
            self.assertEqual([(r["scenario"], r["apr"]) for r in kept], [("alone", 2), ("behind", 3)])
            text = page.read_text()
        self.assertTrue(text.startswith("before\n") and text.endswith("after\n") and "old" not in text)
        self.assertIn("| 64 words alone: first token | 2.00 s | 9.00 s | 4.5 |", text)

    def test_every_figure_has_a_name(self):
        self.assertEqual({scenario for scenario, _ in loads.WHAT}, set(loads.SCENARIOS))

    def test_events(self):
        self.assertIsNone(loads.event(b": keep-alive\n"))
        self.assertIsNone(loads.event(b"data: [DONE]\n"))
        self.assertEqual(loads.event(b'data: {"a": 1}\n'), {"a": 1})


if __name__ == "__main__":
    unittest.main()
