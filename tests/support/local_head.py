"""A Ray head by `ray start` that only this machine reaches, with a token, ports and a folder of its own.

Its processes are found by a variable in their environment and ended by their ids: other Rays of the machine are left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

MARK = "CBTM_LOCAL_HEAD"
WAIT_S = 600
TRIES = 4  # of `ray start`
PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
         "runtime-env-agent-port", "metrics-export-port", "object-manager-port", "node-manager-port")  # fmt: skip

# `ray start` lets no node join a head that keeps to localhost; Ray's own stand-in for a cloud starts nodes in this way.
_NODE = """
import sys
from ray._private.node import Node
from ray._private.parameter import RayParams
address, cpus = sys.argv[1:]
own = {"num_cpus": int(cpus), "num_gpus": 0, "object_store_memory": 100 << 20}
ports = {"min_worker_port": 0, "max_worker_port": 0, "dashboard_agent_listen_port": 0}
params = RayParams(redis_address=address, gcs_address=address, **own, **ports)
Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
"""


def wait_for(ready: Callable[[], Any], what: str, limit_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not come within {limit_s} s"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports of localhost that nobody uses now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class LocalHead:
    """`ray start --head --block` and all that came of it; `environment` is what a client needs to submit jobs."""

    def __init__(self, folder: Path) -> None:
        self._ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.address = f"127.0.0.1:{self._ports['port']}"
        self.dashboard = f"http://127.0.0.1:{self._ports['dashboard-port']}"
        self._process: subprocess.Popen | None = None
        self._mark, self._log, self._token = secrets.token_hex(8), folder / "head.log", secrets.token_hex(32)
        # Sockets have paths of at most 107 bytes, so Ray's folder is not below that of a test.
        self.temp_dir = Path(tempfile.mkdtemp(prefix="ray-head-"))
        (folder / "auth_token").write_text(self._token)
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {
            **own,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"),
            "RAY_API_SERVER_ADDRESS": self.dashboard,
        }

    def start(self, *more: str, cpus: int, extra: dict[str, str] | None = None) -> None:
        """`ray start` with `more` arguments and `extra` in its environment; returns when the job API answers."""
        arguments = [*more, f"--num-cpus={cpus}", f"--temp-dir={self.temp_dir}", "--disable-usage-stats"]
        arguments += [f"--{name}={port}" for name, port in self._ports.items()]
        environment = {**self._own_environment(), **(extra or {})}
        for _ in range(TRIES):  # on a busy machine a raylet may take longer than the 30 s that `ray start` gives it
            self._launch(arguments, environment)
            wait_for(lambda: self._is_up() or self._has_ended(), "the head")
            if not self._has_ended():
                return
            self.kill()
        raise AssertionError(self._log.read_text())

    def _own_environment(self) -> dict[str, str]:
        """That of the head's processes."""
        return {
            **self.environment,
            MARK: self._mark,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all of Ray listens on localhost alone
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        }

    def add_node(self, cpus: int) -> psutil.Process:
        """Another node on this machine; its raylet, once the head knows the node."""
        before = set(self.nodes())
        with self._log.open("ab") as log:
            command = [sys.executable, "-c", _NODE, self.address, str(cpus)]
            subprocess.run(command, env=self._own_environment(), stdout=log, stderr=log, check=True)
        wait_for(lambda: set(self.nodes()) - before, "the node")
        (node_id,) = set(self.nodes()) - before
        (raylet,) = (process for process in self.processes("raylet/raylet") if node_id in " ".join(process.cmdline()))
        return raylet

    def nodes(self) -> list[str]:
        """Ids of the nodes that live, the head's too."""
        summary = json.loads(self.ask("/nodes?view=summary"))["data"]["summary"]
        return [node["raylet"]["nodeId"] for node in summary if node["raylet"].get("state") == "ALIVE"]

    def _launch(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.temp_dir.mkdir(exist_ok=True)
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(
                ["ray", "start", "--head", "--block", *arguments],
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _is_up(self) -> bool:
        try:
            return "Ray runtime started" in self._log.read_text() and bool(self.ask("/api/version"))
        except OSError:
            return False

    def ask(self, path: str) -> bytes:
        """What the dashboard answers."""
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {self._token}"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.read()

    def processes(self, having: str = "") -> list[psutil.Process]:
        """Those of this head that live, with `having` in their command line."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(MARK) == self._mark:
                    # Its children too: what Ray gives a title of its own has lost its environment by that.
                    found |= {process, *process.children(recursive=True)}
        return [process for process in found if _is_alive(process, having)]

    def kill(self) -> None:
        while alive := self.processes():
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)
        if self._process:
            self._process.wait()
        shutil.rmtree(self.temp_dir, ignore_errors=True)


def _is_alive(process: psutil.Process, having: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and having in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def local_head(folder: Path) -> Iterator[LocalHead]:
    """A head to be started, for the length of the block; the output of `ray start` goes to `folder`."""
    head = LocalHead(folder)
    try:
        yield head
    finally:
        head.kill()
