"""The dependency audit asks one database, says what it found, and needs no network to pass."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def database():
    """Knows one vulnerable package: the first that is asked about."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
            assert all(query["package"]["ecosystem"] == "PyPI" and query["version"] for query in queries)
            results = [{"vulns": [{"id": "PYSEC-1"}, {"id": "GHSA-2"}]}, *({} for _ in queries[1:])]
            body = json.dumps({"results": results}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/querybatch"
    server.shutdown()
    server.server_close()


def audit(*arguments: str) -> tuple[int, list[str]]:
    command = [sys.executable, str(ROOT / ".ci/audit.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_findings_are_named_and_only_the_strict_audit_fails(database) -> None:
    code, lines = audit("--url", database)
    assert code == 0 and lines[0].startswith("dependency audit: absl-py ") and lines[0].endswith(": PYSEC-1, GHSA-2")
    assert lines[1].startswith("dependency audit: 1 of ")
    assert audit("--url", database, "--strict")[0] == 1


def test_without_a_network_it_is_one_line(database) -> None:
    code, lines = audit("--url", "http://127.0.0.1:1/v1")
    assert code == 0 and len(lines) == 1 and lines[0].startswith("dependency audit: skipped, no answer from 127.0.0.1")
    assert audit("--url", "http://127.0.0.1:1/v1", "--strict")[0] == 1
