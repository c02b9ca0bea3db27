"""Keys, HTTPS and a limit on time, as the official clients of OpenAI, Anthropic and Ollama meet them."""

import ssl
import subprocess
import tempfile
import unittest
from pathlib import Path

import anthropic
import ollama
import openai
from server import Server

HELLO = [{"role": "user", "content": "Hello there"}]
KEY = "open-sesame"


def certificate(folder):
    """Writes a certificate that vouches for itself, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
               "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


class KeysOverTls(unittest.TestCase):
    """A certificate that only those know who are told of it, and a key: what stands on an address that others reach."""

    @classmethod
    def setUpClass(cls):
        folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cert, key = certificate(folder)
        keys = folder / "keys"
        keys.write_text(f"# of the tests\n{KEY}\n")
        cls.trusted = ssl.create_default_context(cafile=str(cert))
        cls.server = cls.enterClassContext(Server("--tls-cert", str(cert), "--tls-key", str(key), "--api-key-file", str(keys)))
        assert cls.server.url.startswith("https://"), cls.server.url

    def test_openai(self):
        def ask(key, verify=self.trusted):
            options = {"base_url": self.server.url + "/v1", "api_key": key, "max_retries": 0}
            with openai.OpenAI(http_client=openai.DefaultHttpxClient(verify=verify), **options) as client:
                return client.chat.completions.create(model=self.server.model, messages=HELLO, max_tokens=2).usage.completion_tokens

        self.assertIn(ask(KEY), (1, 2))
        self.assertRaises(openai.AuthenticationError, ask, "another")
        with self.assertRaisesRegex(openai.APIConnectionError, "Connection error") as refused:
            ask(KEY, verify=True)
        self.assertIn("CERTIFICATE_VERIFY_FAILED", str(refused.exception.__cause__))

    def test_anthropic(self):
        def ask(**access):
            http_client = anthropic.DefaultHttpxClient(verify=self.trusted)
            with anthropic.Anthropic(base_url=self.server.url, max_retries=0, http_client=http_client, **access) as client:
                return client.messages.create(model=self.server.model, messages=HELLO, max_tokens=2).usage.output_tokens

        # One is sent as x-api-key, the other as Authorization: Bearer.
        self.assertIn(ask(api_key=KEY), (1, 2))
        self.assertIn(ask(api_key=None, auth_token=KEY), (1, 2))
        self.assertRaises(anthropic.AuthenticationError, ask, api_key="another")

    def test_ollama(self):
        def ask(key):
            client = ollama.Client(host=self.server.url, verify=self.trusted, headers={"Authorization": f"Bearer {key}"})
            self.addCleanup(client._client.close)
            return client.chat(self.server.model, HELLO, options={"num_predict": 2}).eval_count

        self.assertIn(ask(KEY), (1, 2))
        with self.assertRaises(ollama.ResponseError) as refused:
            ask("another")
        self.assertEqual(refused.exception.status_code, 401)


class RequestTimeout(unittest.TestCase):
    """A server that gives an answer a tenth of a second, and answers that would take longer."""

    N = 4000

    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(Server("--request-timeout", "0.1", n_ctx=4096))

    def test_openai(self):
        with openai.OpenAI(base_url=self.server.url + "/v1", api_key="none", max_retries=0) as client:
            def ask(**more):
                options = {"max_tokens": self.N, "extra_body": {"ignore_eos": True}, **more}
                return client.chat.completions.create(model=self.server.model, messages=HELLO, **options)

            with self.assertRaises(openai.InternalServerError) as late:
                ask()
            self.assertEqual((late.exception.status_code, late.exception.code), (504, "timeout"))
            # What came in time is the client's before it hears of the rest.
            begun = []
            with self.assertRaises(openai.APIError) as late:
                begun.extend(ask(stream=True))
            self.assertEqual(late.exception.code, "timeout")

    def test_anthropic(self):
        with anthropic.Anthropic(base_url=self.server.url, api_key="none", max_retries=0) as client:
            ask = {"model": self.server.model, "messages": HELLO, "max_tokens": self.N, "extra_body": {"ignore_eos": True}}
            with self.assertRaises(anthropic.APIStatusError) as late:
                client.messages.create(**ask)
            self.assertEqual(late.exception.status_code, 504)
            self.assertEqual(late.exception.body["error"]["type"], "timeout_error")
            with self.assertRaises(anthropic.APIStatusError) as late:
                list(client.messages.create(**ask, stream=True))
            self.assertEqual(late.exception.body["error"]["type"], "timeout_error")

    def test_ollama(self):
        client = ollama.Client(host=self.server.url)
        self.addCleanup(client._client.close)
        # Ollama has no way to forbid the end, but that of a form without one.
        endless = {"type": "array", "items": {"type": "integer"}, "minItems": self.N}
        ask = {"model": self.server.model, "messages": HELLO, "options": {"num_predict": self.N}, "format": endless}
        with self.assertRaises(ollama.ResponseError) as late:
            client.chat(**ask)
        self.assertEqual(late.exception.status_code, 504)
        with self.assertRaisesRegex(ollama.ResponseError, "not complete within 0.1 s"):
            list(client.chat(**ask, stream=True))


if __name__ == "__main__":
    unittest.main()
