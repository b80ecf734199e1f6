"""Bytes between training processes, counted in the kernel: python -m benchmarks.traffic [--experts 4 --slots 2]

Experts train beside each other, first with one process each, then with two that share the expert's batch by DDP. Every
TCP connection of every training process is watched through `ss` (iproute2), which tells the bytes it has carried: between
the processes of different experts there must be none. That two of one expert do talk shows that the count can see it. The
last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
import threading
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.faults import arguments, named, parser, training_workers
from benchmarks.training import make_run
from cbtm_ray.branch.launch import expert_branches, train_branches
from cbtm_ray.ray_session import ray_session
from cbtm_ray.run import Run

Pair = tuple[int, int]
CONNECTION = re.compile(r"^\d+\s+\d+\s+(\S+)\s+(\S+)\s+users:.*?pid=(\d+).*?bytes_sent:(\d+)", re.MULTILINE)
"""Local and peer address, process, bytes sent, in a line of `ss -tinpHO state established`."""


class Traffic:
    """Bytes that each process has sent to each other one; those sent to no known process of this machine go to -1."""

    def __init__(self) -> None:
        self.training: set[int] = set()
        self._sent: dict[tuple[str, str, int], int] = {}
        self._owners: dict[str, int] = {}

    def look(self) -> None:
        self.training |= {process.pid for process in training_workers()}
        command = ["ss", "-tinpHO", "state", "established"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for local, peer, pid, sent in CONNECTION.findall(lines.replace("[::ffff:127.0.0.1]", "127.0.0.1")):
            self._owners[local] = int(pid)
            self._sent[local, peer, int(pid)] = int(sent)

    def between(self) -> dict[Pair, int]:
        """Bytes by sender and receiver, where at least one of them trains."""
        found: dict[Pair, int] = {}
        for (_, peer, pid), sent in self._sent.items():
            pair = pid, self._owners.get(peer, -1)
            if self.training & set(pair):
                found[pair] = found.get(pair, 0) + sent
        return found


def watch(traffic: Traffic, over: threading.Event) -> None:
    while not over.wait(0.5):
        traffic.look()


def count(run: Run, folder: str, args: argparse.Namespace) -> Traffic:
    """Train all experts of the run; the traffic meanwhile."""
    branches = named([branch for branch in expert_branches(run) if branch.cluster is not None], folder)
    traffic, over = Traffic(), threading.Event()
    traffic.look()  # fails here, not in the thread, where ss is missing or does not know the options
    watcher = threading.Thread(target=watch, args=(traffic, over), daemon=True)
    watcher.start()
    cpus = run.config.train.workers_per_expert
    train_branches(run, branches, title="traffic", cpus=cpus, slots=args.slots)
    over.set()
    watcher.join()
    return traffic


def by_expert(traffic: Traffic, workers: int) -> tuple[int, int, int]:
    """Bytes within an expert, between experts, and between trainings and all other processes.

    Processes that talk to each other are taken for one expert as long as they are no more than an expert's workers.
    """
    between = traffic.between()
    talking = [{*pair} for pair in between if set(pair) <= traffic.training]
    experts: list[set[int]] = []
    for pair in talking:
        joined = [expert for expert in experts if expert & pair]
        experts = [expert for expert in experts if not expert & pair] + [pair.union(*joined)]
    apart = [expert for expert in experts if len(expert) > workers]
    inside = sum(sent for pair, sent in between.items() if any(set(pair) <= e for e in experts if e not in apart))
    across = sum(sent for pair, sent in between.items() if any(set(pair) <= e for e in apart))
    return inside, across, sum(between.values()) - inside - across


def main() -> None:
    args, console = arguments(parser(__doc__, experts=4, steps=100)), Console()
    table = Table("processes an expert", "processes seen", "within an expert, kB", "between experts, B", "with Ray, kB")
    result = {}
    with tempfile.TemporaryDirectory() as folder, ray_session(local_cpus=2 * args.slots):
        run = make_run(Path(folder), args, n_clusters=args.experts)
        for workers in (1, 2):
            train = dataclasses.replace(run.config.train, workers_per_expert=workers)
            traffic = count(Run(dataclasses.replace(run.config, train=train)), f"workers={workers}", args)
            inside, across, others = by_expert(traffic, workers)
            seen = f"{len(traffic.training)} of {workers * args.experts}"
            table.add_row(str(workers), seen, f"{inside / 1000:,.0f}", f"{across:,}", f"{others / 1000:,.0f}")
            result[f"workers={workers}"] = {
                "seen": len(traffic.training),
                "within_bytes": inside,
                "between_bytes": across,
            }
    console.print(table)
    print(json.dumps({"experts": args.experts, "cpus": psutil.cpu_count(), **result}))


if __name__ == "__main__":
    main()
