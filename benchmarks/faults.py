"""Experts on few slots while their workers are killed: python -m benchmarks.faults [--experts 24 --slots 2 --kills 3]

The same small experts twice, undisturbed and with SIGKILL to training workers at seeded random times. What is looked at:
whether all finish with the same losses, how often one was started again and how many steps it did again (all of them if it
was trained twice), in which order they began, and the makespan against the ideal: the seconds that the undisturbed experts
took in their workers, shared by the slots. What is above it is Ray's starting of runs, and slots that idle at the end. The
last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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
from cbtm_ray.branch.branches import Branch, expert_branches
from cbtm_ray.branch.launch import train_branches
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
    manifests = [run.require(branch.spec.name, "train_experts") for branch in branches]
    first_starts = [manifest["starts"][0]["at"] for manifest in manifests]
    again = [start for manifest in manifests for start in manifest["starts"][1:]]
    return {
        "finished": len(manifests),
        "makespan_s": max(manifest["ended"] for manifest in manifests) - started,
        "busy_s": sum(manifest["seconds"] for manifest in manifests),
        "killed_after_s": [round(at - started, 1) for at in killed],
        "order": sorted(range(len(manifests)), key=lambda k: first_starts[k]),
        "steps_redone": [start["redone"] for start in again],
        "losses": [manifest["curve"][-1]["loss_nats"] for manifest in manifests],
    }


def named(branches: list[Branch], folder: str, **train: Any) -> list[Branch]:
    """The experts under names of their own, so that a run can train them twice; `train` are changes of their options."""
    train = {"checkpoint_every": 10, **train}
    found = []
    for branch in branches:
        name, options = f"{folder}/{branch.cluster:04d}", dataclasses.replace(branch.spec.train, **train)
        spec = dataclasses.replace(branch.spec, name=name, train=options)
        found.append(dataclasses.replace(branch, spec=spec))
    return found


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
    args, console = parse_args(), Console(width=120)
    with tempfile.TemporaryDirectory() as folder, ray_session(local_cpus=args.slots):
        run = make_run(Path(folder), args, n_clusters=args.experts)
        branches = [branch for branch in expert_branches(run) if branch.cluster is not None]
        calm = train_all(run, named(branches, "calm", log_every=1), args, kills=0)
        rough = train_all(run, named(branches, "rough", log_every=1), args, kills=args.kills)
    ideal_s = calm["busy_s"] / args.slots
    table = Table("run", "kills at, s", "finished", "starts after kills", "steps redone", "makespan, s", "/ ideal")
    for name, found in (("undisturbed", calm), ("killed", rough)):
        table.add_row(
            name,
            ", ".join(map(str, found["killed_after_s"])),
            f"{found['finished']} of {args.experts}",
            str(len(found["steps_redone"])),
            ", ".join(map(str, found["steps_redone"])),
            f"{found['makespan_s']:.1f}",
            f"{found['makespan_s'] / ideal_s:.2f}",
        )
    console.print(table)
    for name, found in (("undisturbed", calm), ("killed", rough)):
        console.print(f"order of {name}: {' '.join(map(str, found['order']))}")
    found = {
        "finished": rough["finished"],
        "kills": len(rough["killed_after_s"]),
        "started_again": len(rough["steps_redone"]),
        "most_steps_redone": max(rough["steps_redone"], default=0),
        "same_losses": rough["losses"] == calm["losses"],
        "ideal_s": round(ideal_s, 1),
        "calm_to_ideal": round(calm["makespan_s"] / ideal_s, 3),
        "killed_to_ideal": round(rough["makespan_s"] / ideal_s, 3),
        "makespan_ratio": round(rough["makespan_s"] / calm["makespan_s"], 3),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
