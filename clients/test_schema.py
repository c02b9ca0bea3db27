"""Requests that /openapi.json allows, and requests that it does not, made up by schemathesis: first those at the limits of every
field, which are the same each time, then some at random, of which only the answers are checked.

No answer may be a 5xx, and every answer has to be one that the document names: its status, type and shape. What the document
forbids has to be refused. What it allows may still be refused: with a 400, as limits of the model and its context are in no
document, and with a 403, as this server has no key for looking inside and no other model to pull.
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest
import urllib.request
from pathlib import Path

from server import Server

# Seconds of requests made up at random, besides those at the limits of what the document allows.
SECONDS = os.environ.get("SCHEMA_SECONDS", "20")

CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 403]
"""


def get(url):
    with urllib.request.urlopen(url) as reply:
        return json.load(reply)


class Schema(unittest.TestCase):
    def test_answers_are_those_that_the_document_names(self):
        with Server("--parallel", "4") as server, tempfile.TemporaryDirectory() as folder:
            document, models = (get(server.url + path) for path in ("/openapi.json", "/v1/models"))
            # Made-up names would all be those of no model, and most tokens none of its.
            document["components"]["schemas"]["ModelName"] = {"enum": [server.model, None]}
            document["components"]["schemas"]["Token"]["maximum"] = models["data"][0]["meta"]["n_vocab"] - 1
            document["paths"]["/v1/models/{id}"]["get"]["parameters"][0]["schema"] = {"enum": [server.model]}
            # With the header every chat would be refused, as nobody is an administrator here.
            for operation in (o for path in document["paths"].values() for o in path.values()):
                parameters = operation.get("parameters", [])
                operation["parameters"] = [p for p in parameters if not p.get("$ref", "").endswith("/Trace")]
            (Path(folder) / "openapi.json").write_text(json.dumps(document))
            (Path(folder) / "schemathesis.toml").write_text(CONFIG)
            self.run_on(server, folder, "--phases", "examples,coverage", "--checks", "all")
            checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
            self.run_on(server, folder, "--phases", "fuzzing", "--checks", checks, "--max-time", SECONDS)
            self.assertEqual(get(server.url + "/health"), {"status": "ok"})

    def run_on(self, server, folder, *args):
        command = [Path(sys.executable).parent / "st", "--config-file", "schemathesis.toml", "run", "openapi.json"]
        command += ["--url", server.url, "--seed", "1", "--continue-on-failure", "--request-timeout", "60"]
        command += ["--generation-database", "none", "--no-color", *args]
        done = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout)


if __name__ == "__main__":
    unittest.main()
