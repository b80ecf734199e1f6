"""Experts on few slots while their workers are killed: python -m benchmarks.faults [--experts 24 --slots 2 --kills 3]

The same small experts twice, undisturbed and with SIGKILL to training workers at seeded random times. What is looked at:
whether all finish, how often each was started, whether any step was trained again beyond a checkpoint's interval, in which
order they began, and the makespan against that of the undisturbed run. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.training import make_run
from cbtm_ray.branch import Branch, expert_branches, train_branches
from cbtm_ray.ray_session import ray_session
from cbtm_ray.run import Run


def training_workers() -> list[psutil.Process]:
    """Ray Train's workers of this process' own Ray that have been up for some seconds."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # they come and go meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()) and time.time() - process.create_time() > 5:
                found.append(process)
    return found


def kill_at_random(kills: int, pause_s: float, rng: random.Random, over: threading.Event, killed: list[float]) -> None:
    """SIGKILL one training worker after another, each after a random pause of `pause_s` on average."""
    while len(killed) < kills and not over.wait(rng.uniform(0.5, 1.5) * pause_s):
        if candidates := training_workers():
            os.kill(rng.choice(candidates).pid, signal.SIGKILL)
            killed.append(time.time())


def train_all(run: Run, branches: list[Branch], args: argparse.Namespace, kills: int) -> dict[str, Any]:
    """Train the branches under `kills` kills; what the manifests say of it."""
    over, killed, rng = threading.Event(), list[float](), random.Random(args.seed)
    killer = threading.Thread(target=kill_at_random, args=(kills, args.pause, rng, over, killed), daemon=True)
    started = time.time()
    killer.start()
    train_branches(run, branches, title="faults", cpus=1, slots=args.slots, per_run=args.per_run)
    over.set()
    killer.join()
    manifests = [run.need(branch.spec.name, "train_experts") for branch in branches]
    first_starts = [manifest["starts"][0] for manifest in manifests]
    return {
        "finished": len(manifests),
        "makespan_s": time.time() - started,
        "killed_after_s": [round(at - started, 1) for at in killed],
        "starts": [len(manifest["starts"]) for manifest in manifests],
        "begun_before_an_earlier_one": sum(later < earlier for earlier, later in itertools.pairwise(first_starts)),
        "losses": [manifest["curve"][-1]["loss_nats"] for manifest in manifests],
    }


def named(branches: list[Branch], folder: str) -> list[Branch]:
    """The experts under names of their own, so that a run can train them twice."""
    return [
        dataclasses.replace(
            branch, spec=dataclasses.replace(branch.spec, name=f"{folder}/{branch.cluster:04d}", checkpoint_every=10)
        )
        for branch in branches
    ]


def parser(doc: str | None, *, experts: int, steps: int) -> argparse.ArgumentParser:
    """What an experiment with many small experts can be told; `experts` and `steps` are its defaults."""
    found = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    found.add_argument("--experts", type=int, default=experts)
    found.add_argument("--slots", type=int, default=2, help="runs at once")
    found.add_argument("--ray-steps", type=int, default=steps, help="steps of an expert")
    found.add_argument("--batch", type=int, default=8, help="sequences in a step")
    found.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    found.add_argument("--seed", type=int, default=0)
    return found


def arguments(known: argparse.ArgumentParser) -> argparse.Namespace:
    """What was told, for experts of the first size and one thread each."""
    return argparse.Namespace(**vars(known.parse_args()), sizes=["1M"], threads=1)


def parse_args() -> argparse.Namespace:
    known = parser(__doc__, experts=24, steps=40)
    known.add_argument("--per-run", type=int, default=4, help="experts that one Ray Train run trains")
    known.add_argument("--kills", type=int, default=3)
    known.add_argument("--pause", type=float, default=20, help="mean seconds between kills")
    return arguments(known)


def main() -> None:
    args, console = parse_args(), Console()
    with tempfile.TemporaryDirectory() as folder, ray_session(local_cpus=args.slots):
        run = make_run(Path(folder), args, n_clusters=args.experts)
        branches = [branch for branch in expert_branches(run) if branch.cluster is not None]
        calm = train_all(run, named(branches, "calm"), args, kills=0)
        rough = train_all(run, named(branches, "rough"), args, kills=args.kills)
    table = Table("run", "kills at, s", "finished", "started again", "begun out of order", "makespan, s")
    for name, found in (("undisturbed", calm), ("killed", rough)):
        again = sum(found["starts"]) - len(found["starts"])
        kills = ", ".join(map(str, found["killed_after_s"]))
        order = str(found["begun_before_an_earlier_one"])
        table.add_row(
            name, kills, f"{found['finished']} of {args.experts}", str(again), order, f"{found['makespan_s']:.1f}"
        )
    console.print(table)
    found = {
        "finished": rough["finished"],
        "kills": len(rough["killed_after_s"]),
        "started_again": sum(rough["starts"]) - args.experts,
        "same_losses": rough["losses"] == calm["losses"],
        "makespan_ratio": round(rough["makespan_s"] / calm["makespan_s"], 3),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
