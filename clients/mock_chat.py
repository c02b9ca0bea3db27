"""A server that answers chats with texts of its own, for tests of the page: text that a real model cannot be made to write
(attacks, markdown of every kind, calls of tools), tokens with alternatives, experts, keys, and errors.

The page itself comes from a real `apr serve`, headers and all.
"""

import json
import math
import re
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

N_LAYER, N_EXPERT, N_USED = 48, 128, 8


def tokens_of(text):
    """Pieces as a tokenizer would cut them: words with the space before them, and single marks."""
    return re.findall(r"\s?\w+|\s|[^\w\s]", text)


def experts_at(position, n_layer=N_LAYER, n_expert=N_EXPERT):
    """Experts that look like a router's: each layer has favourites and a few of the token's own."""
    layers = []
    for layer in range(n_layer):
        own = [(layer * 37 + position * (k * k + 3) * 13) % n_expert for k in range(N_USED - 3)]
        liked = [(layer * 29 + k * 41) % n_expert for k in range(3)]
        layers.append(list(dict.fromkeys(liked + own))[:N_USED])
    return {"layers": layers}


class Answer:
    """What is said to a message."""

    def __init__(self, text="", reasoning="", calls=(), delay=0.0, status=200, error=None, breaks=False, experts=True):
        self.text, self.reasoning, self.calls, self.delay = text, reasoning, calls, delay
        self.status, self.error, self.breaks, self.experts = status, error, breaks, experts


class Mock:
    """Listens on a free port; `answers` maps a word of the last message to an `Answer`."""

    def __init__(self, page_url, answers, key=None):
        self.page_url, self.answers, self.key = page_url, answers, key
        self.requests = []
        self.n_open = 0
        mock = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                mock.get(self)

            def do_POST(self):
                mock.post(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def get(self, handler):
        if handler.path == "/health":
            return send(handler, 200, {"status": "ok"})
        if handler.path == "/v1/models":
            if not self.is_let_in(handler):
                return None
            card = {"id": "mock-48x128", "object": "model", "max_model_len": 4096, "meta": {"n_ctx": 4096}}
            return send(handler, 200, {"object": "list", "data": [card]})
        try:
            with urllib.request.urlopen(self.page_url + handler.path) as reply:
                headers = {k: v for k, v in reply.headers.items() if k.lower() not in ("content-length", "date")}
                return send_bytes(handler, 200, reply.read(), headers)
        except urllib.error.HTTPError as e:
            return send(handler, e.code, {"error": {"message": "none"}})

    def is_let_in(self, handler):
        if self.key is None or handler.headers.get("authorization") == f"Bearer {self.key}":
            return True
        send(handler, 401, {"error": {"message": "a key is needed", "type": "authentication_error"}})
        return False

    def post(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        if not self.is_let_in(handler):
            return
        self.requests.append(body)
        asked = body["messages"][-1]["content"] or ""
        if body["messages"][-1]["role"] == "assistant":
            asked = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
        answer = next((a for word, a in self.answers.items() if word in asked), Answer(f"You said: {asked}"))
        if answer.status != 200:
            send(handler, answer.status, {"error": {"message": answer.error, "type": "server_error"}})
            return
        self.n_open += 1
        try:
            stream(handler, body, answer)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            self.n_open -= 1


def send(handler, status, body):
    send_bytes(handler, status, json.dumps(body).encode(), {"content-type": "application/json"})


def send_bytes(handler, status, body, headers):
    handler.send_response(status)
    for name, value in {**headers, "content-length": len(body)}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def stream(handler, body, answer):
    handler.send_response(200)
    for name, value in {"content-type": "text/event-stream", "connection": "close"}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.close_connection = True

    def event(data):
        handler.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        handler.wfile.flush()

    def chunk(delta, token=None, position=0, finish=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        if token is not None and body.get("logprobs"):
            choice["logprobs"] = {"content": [logprob(token, position, body["top_logprobs"])]}
            if body.get("apr_experts") and answer.experts:
                choice["apr_experts"] = experts_at(position)
        event({"object": "chat.completion.chunk", "choices": [choice]})

    chunk({"role": "assistant", "content": ""})
    n = 0
    for tag, kind, text in (("<think>", "reasoning_content", answer.reasoning), ("</think>", "content", answer.text)):
        if answer.reasoning:
            chunk({}, tag, n)
            n += 1
        for token in tokens_of(text)[: body.get("max_tokens")]:
            chunk({kind: token}, token, n)
            n += 1
            time.sleep(answer.delay)
    for index, (name, arguments) in enumerate(answer.calls):
        call = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        chunk({"tool_calls": [call]})
        for part in tokens_of(arguments):
            chunk({"tool_calls": [{"index": index, "function": {"arguments": part}}]})
    if answer.breaks:
        return
    chunk({}, finish="tool_calls" if answer.calls else "stop")
    event({"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": n, "prompt_tokens_details": {"cached_tokens": 12}},
           "timings": {"prompt_ms": 80.0, "predicted_per_second": 42.0}})
    handler.wfile.write(b"data: [DONE]\n\n")
    handler.wfile.flush()


def logprob(token, position, n):
    """A token of some likelihood, among others."""
    p = [0.93, 0.61, 0.98, 0.34, 0.82, 0.12, 0.99, 0.47][(position * 5) % 8]
    rest = 1 - p
    words = [" a", " the", " one", ",", " this", " it", " some", "\n", " an", " no", " that"]
    others = [(word, rest * 0.5 ** (k + 1)) for k, word in enumerate(w for w in words if w != token)]
    best = sorted([(token, p), *others], key=lambda o: -o[1])[:n]
    told = lambda t, q: {"token": t, "logprob": math.log(q), "bytes": list(t.encode())}
    return {**told(token, p), "top_logprobs": [told(t, q) for t, q in best]}
