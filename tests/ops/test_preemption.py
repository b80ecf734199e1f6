"""A spot notice becomes a drain of the node: against a stand-in of the metadata servers."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ops import preemption
from ops.preemption import Notice, aws_notice, gcp_notice, watch


class Metadata(BaseHTTPRequestHandler):
    """What EC2's and Compute Engine's metadata servers answer; `server.notice` is what either would say of the node."""

    def do_PUT(self) -> None:
        wanted = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self.answer(next(self.server.tokens) if wanted else 400, "a-token")  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        notice = self.server.notice  # type: ignore[attr-defined]
        if self.path == "/latest/meta-data/spot/instance-action":
            allowed = self.headers["X-aws-ec2-metadata-token"] == "a-token"
            self.answer((200 if notice else 404) if allowed else 401, notice or "")
        elif self.path == "/computeMetadata/v1/instance/preempted":
            self.answer(200 if self.headers["Metadata-Flavor"] == "Google" else 403, notice or "FALSE")
        else:
            self.answer(404, "")

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))  # in one-byte characters
        self.end_headers()
        self.wfile.write(body.encode(errors="surrogateescape"))

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.notice, server.tokens = None, itertools.repeat(200)  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def ec2_notice(seconds: float) -> str:
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_nodes_run_the_file_alone(tmp_path: Path) -> None:
    alone = shutil.copy(preemption.__file__, tmp_path)
    done = subprocess.run([sys.executable, "-I", alone, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_node_without_a_notice_has_none(metadata: ThreadingHTTPServer) -> None:
    assert aws_notice(url(metadata)) is None
    assert gcp_notice(url(metadata)) is None


def test_ec2_says_when_and_what(metadata: ThreadingHTTPServer) -> None:
    metadata.notice = ec2_notice(100)  # type: ignore[attr-defined]
    notice = aws_notice(url(metadata))
    assert notice is not None
    assert notice.what == "EC2 will terminate the node"
    assert 90 <= notice.remaining_s <= 100
    metadata.notice = ec2_notice(-100)  # type: ignore[attr-defined]
    assert aws_notice(url(metadata)) == Notice("EC2 will terminate the node", 0)


def test_compute_engine_leaves_30_seconds(metadata: ThreadingHTTPServer) -> None:
    metadata.notice = "TRUE"  # type: ignore[attr-defined]
    assert gcp_notice(url(metadata)) == Notice("Compute Engine preempts the node", 30)


def test_a_proxy_is_not_asked(metadata: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert gcp_notice(url(metadata)) is None


@pytest.mark.parametrize("answer", ["no JSON", "{}", "[]", '{"action": "stop", "time": "soon"}', "\udcff"])
def test_an_answer_that_nobody_expects_is_logged_and_the_watch_goes_on(
    metadata: ThreadingHTTPServer, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    answers = iter([answer, ec2_notice(100)])

    def ask() -> Notice | None:
        metadata.notice = next(answers)  # type: ignore[attr-defined]
        return aws_notice(url(metadata))

    assert watch(ask, lambda notice: None, poll_s=0).what == "EC2 will terminate the node"
    assert "asking again" in caplog.text
    assert "Traceback" in caplog.text


def test_a_metadata_server_without_tokens_is_asked_again(
    metadata: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata.notice, metadata.tokens = ec2_notice(100), iter([404, 200])  # type: ignore[attr-defined]
    assert watch(lambda: aws_notice(url(metadata)), lambda notice: None, poll_s=0).remaining_s > 0
    assert "gives no token; asking again" in capsys.readouterr().err


def test_it_asks_until_there_is_a_notice_and_until_ray_has_taken_it(
    metadata: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that is not there yet, a node without a notice, and a head that refuses at first."""
    answers = iter([OSError("no answer"), None, Notice("the end", 9), Notice("the end", 8)])
    taken: list[Notice] = []

    def ask() -> Notice | None:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    def take(notice: Notice) -> None:
        taken.append(notice)
        if len(taken) == 1:
            raise subprocess.CalledProcessError(1, "ray drain-node")

    assert watch(ask, take, poll_s=0) == Notice("the end", 8)
    assert taken == [Notice("the end", 9), Notice("the end", 8)]
    out, err = capsys.readouterr()
    assert out.count("the end in") == 2
    assert err.count("asking again") == 2
