"""Hosts on this machine: namespaces of network, processes and mounts, joined by a switch. Linux, root and iproute2 only.

A host has a name, an address, ports, processes, memory-backed disks of its own at /tmp/ray, /dev/shm and `disk`, and nothing
else to itself: the code and the rest of the file system are those of the machine. Killing it ends all its processes at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.support.local_head import TRIES, wait_for

NETWORK = "10.77.0"
NAMESPACES = ("net", "mount", "pid", "uts")
SILENT: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
_INIT = "sleep infinity & wait"  # bash, which also reaps what daemons leave behind


def missing() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.geteuid() != 0:
        return "needs root"
    if not all(shutil.which(tool) for tool in ("ip", "unshare", "nsenter")):
        return "needs iproute2 and util-linux"
    done = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return None if done.returncode == 0 else "namespaces are not allowed here"


class Namespaces:
    """A process that holds namespaces, and commands inside them."""

    def __init__(self) -> None:
        flags = [f"--{kind}" for kind in NAMESPACES]
        command = ["unshare", *flags, "--fork", "--kill-child", "--mount-proc", "bash", "-c", _INIT]
        self._outer = subprocess.Popen(command, **SILENT)
        wait_for(lambda: psutil.Process(self._outer.pid).children(), "a namespace")
        self._init = psutil.Process(self._outer.pid).children()[0]
        wait_for(lambda: self._init.name() == "bash", "a namespace")
        self.environment: dict[str, str] = {}

    @property
    def pid(self) -> int:
        return self._init.pid

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *(f"--{kind}" for kind in NAMESPACES), "--wd=.", *command]

    def wire(self, *arguments: str) -> None:
        """`ip` on its network, which names processes as the machine does."""
        subprocess.run(["nsenter", f"--target={self.pid}", "--net", "ip", *arguments], check=True)

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess:
        """A command to its end; CalledProcessError with its output if it fails."""
        return subprocess.run(
            self.inside(*command), check=True, capture_output=True, text=True, env=self.environment or None, **options
        )

    def start(self, *command: str, **options: Any) -> subprocess.Popen:
        return subprocess.Popen(self.inside(*command), env=self.environment or None, **options)

    def processes(self, having: str = "") -> list[psutil.Process]:
        """Those inside, with `having` in their command line."""
        found = []
        for process in self._init.children(recursive=True) if self._init.is_running() else []:
            with contextlib.suppress(psutil.NoSuchProcess):  # they come and go meanwhile
                if process.status() != psutil.STATUS_ZOMBIE and having in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """All processes inside at once, as when a machine loses its power."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._init.kill()
        self._outer.wait()


class Network:
    """A switch and the hosts behind it. Nothing outside reaches them, nor they anything outside."""

    def __init__(self, folder: Path) -> None:
        self.disk, self.token, self.hosts = folder / "disk", secrets.token_hex(32), list[Host]()
        self.environment: dict[str, str] = {}
        """What hosts made from now on have beside their own."""
        self.disk.mkdir(parents=True)
        Path("/tmp/ray").mkdir(exist_ok=True)  # for the hosts to mount theirs on
        self.switch = Namespaces()
        self.switch.wire("link", "add", "switch", "type", "bridge")
        self.switch.wire("address", "add", f"{NETWORK}.254/24", "dev", "switch")
        self.switch.wire("link", "set", "switch", "up")

    def add(self, name: str) -> Host:
        self.hosts.append(Host(name, len(self.hosts) + 1, self))
        return self.hosts[-1]

    def close(self) -> None:
        for host in self.hosts:
            host.kill()
        self.switch.kill()


class Host(Namespaces):
    """A machine of the network, with Ray's token in the home of its user."""

    def __init__(self, name: str, number: int, network: Network) -> None:
        super().__init__()
        self.name, self.address, self._switch, self._port = name, f"{NETWORK}.{number}", network.switch, f"port{number}"
        peer = ["type", "veth", "peer", "name", "eth0", "netns", str(self.pid)]
        self._switch.wire("link", "add", self._port, *peer)
        self._switch.wire("link", "set", self._port, "master", "switch", "up")
        self.run("hostname", name)
        for device in ("lo", "eth0"):
            self.wire("link", "set", device, "up")
        self.wire("address", "add", f"{self.address}/24", "dev", "eth0")
        self.wire("route", "add", "default", "via", f"{NETWORK}.254")
        for place in ("/tmp/ray", "/dev/shm", str(network.disk)):
            self.run("mount", "-t", "tmpfs", "tmpfs", place)
        own = {
            key: value for key, value in os.environ.items() if not key.startswith("RAY_") and "proxy" not in key.lower()
        }
        self.environment = {
            **own,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}",
            "HOME": str(network.disk),
            "TMPDIR": str(network.disk),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            **network.environment,
        }
        write_token = f'mkdir "$HOME/.ray" && printf %s {network.token} > "$HOME/.ray/auth_token"'
        self.run("bash", "-c", write_token)

    def cut_off(self) -> None:
        """Pull its cable; its processes live on."""
        self._switch.wire("link", "set", self._port, "down")


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    made = Network(folder)
    try:
        yield made
    finally:
        made.close()


def start_head(network: Network, name: str = "head") -> Host:
    """A head by the line of docs/OPERATIONS.md; returns when its job API answers."""
    head = network.add(name)
    _start_ray(head, "RAY_AUTH_MODE=token ray start --head --num-cpus 0")
    wait_for(lambda: head.start("ray", "job", "list", **SILENT).wait() == 0, "the job API")
    return head


def start_worker(network: Network, head: Host, name: str, cpus: int) -> Host:
    """A worker node by the line of docs/OPERATIONS.md, with the CPUs that Ray is to count."""
    worker = network.add(name)
    _start_ray(worker, f"RAY_AUTH_MODE=token ray start --address {head.address}:6379 --num-cpus {cpus}")
    return worker


def _start_ray(host: Host, line: str) -> None:
    """Again if need be: on a busy machine a raylet may take longer than the 30 s that `ray start` gives it."""
    for _ in range(TRIES - 1):
        if host.start("bash", "-c", line, **SILENT).wait() == 0:
            return
        for process in host.processes("ray"):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    host.run("bash", "-c", line)
