"""A run killed again and again: python -m benchmarks.kills [--kills 20 --seed 0 | --each-stage]

A small run by `ray job submit` on a head and two worker nodes, which are namespaces of this machine (tests/hosts.py: Linux,
root, iproute2) and share the run directory; once undisturbed, then again while something is killed at random moments: a
worker process, a worker node, the driver, or the head, in whose place a new one starts, which knows nothing. Where the job
has ended it is submitted again. After a few kills a run is left to finish, and another follows until all kills are done, so
that the early stages, which take seconds, are struck too. With --each-stage it is one run, and in every stage that has work
for the nodes a worker node at that work is killed. Each finished run must have the undisturbed one's models, clusterer, shards
and results, hash by hash, and the same losses. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from tests.support.artifacts import artifacts
from tests.support.hosts import Host, Network, network, start_head, start_worker
from tests.support.tiny import tiny_tree, write_corpus

ROOT = Path(__file__).parent.parent
STAGES = ("corpus", "tokenizer", "clusterer", "shards", "seed", "experts", "evaluation")
KINDS = {"worker": 8, "driver": 5, "node": 4, "head": 3}  # how often each, relative to the others
DRIVER = "jobs.run_all"


class Cluster:
    """A head and two worker nodes of one CPU, of which any may be replaced."""

    def __init__(self, net: Network) -> None:
        self._net, self._made = net, 0
        self.head, self.workers = start_head(net), list[Host]()
        for _ in range(2):
            self.add_worker()

    def add_worker(self) -> None:
        self._made += 1
        self.workers.append(start_worker(self._net, self.head, f"worker-{self._made}", cpus=1))

    def lose_worker(self, worker: Host) -> None:
        worker.kill()
        self.workers.remove(worker)

    def lose_head(self) -> None:
        """Its workers outlive it for as long as a new one takes to start."""
        self.head.kill()
        orphans = list(self.workers)
        self.head = start_head(self._net, f"head-{self._made}")
        for orphan in orphans:
            self.lose_worker(orphan)
            self.add_worker()


def write_config(folder: Path, args: argparse.Namespace) -> Path:
    """The tests' tiny run with enough steps for kills to fall among them."""
    tree = tiny_tree(folder / "unused", write_corpus(folder / "corpus", shards=6))
    tree["seed_model"]["train_tokens"] = args.steps * 128
    tree["train"] |= {"total_tokens": 2 * args.steps * 128, "checkpoint_every": 50, "log_every": 50}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def submit(cluster: Cluster, config: Path, run_dir: Path, log: IO[str]) -> subprocess.Popen:
    """The command line that waits for the job."""
    job = ["--working-dir", ".", "--", "python", "-m", DRIVER, "--config", str(config), f"run.dir={run_dir}"]
    return cluster.head.start("ray", "job", "submit", *job, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def stage_of(run_dir: Path) -> str:
    """The stage that is not finished yet."""
    return next((stage for stage in STAGES if not (run_dir / stage / "manifest.json").exists()), "report")


def kept(run_dir: Path) -> str:
    """What a job submitted now would find of the stage in work."""
    stage = stage_of(run_dir)
    if stage == "shards":
        return f"{len(list(run_dir.glob('shards/train/part-*.parquet')))} of 6 shards"
    if stage == "clusterer" and (run_dir / "clusterer" / "_state.npz").exists():
        return "centers of the last iteration"
    if stage in ("seed", "experts"):
        models = [path.parent.name for path in run_dir.glob("experts/cluster=*/manifest.json")]
        models += [path.parent.name for path in run_dir.glob("controls/*/manifest.json")]
        steps = {path.parent.parent.name: path.stem for path in sorted(run_dir.glob("checkpoints/**/step=*"))}
        models += [f"{name} {step}" for name, step in steps.items()]
        return ", ".join(sorted(models)) or "-"
    return "-"


def finished(run_dir: Path) -> dict[str, int]:
    """When each manifest of the run was written."""
    return {str(path): path.stat().st_mtime_ns for path in run_dir.rglob("manifest.json")}


def at_work(node: Host) -> list[psutil.Process]:
    """Processes of Ray's that work for the job now."""
    found = []
    for process in node.processes("ray::"):
        title = " ".join(process.cmdline())
        if not any(idle in title for idle in ("IDLE", "DashboardAgent", "RuntimeEnvAgent", "JobSupervisor")):
            found.append(process)
    return found


def driver_of(cluster: Cluster) -> list[psutil.Process]:
    """The job's own process on the head; its shell is another that names the job."""
    return [process for process in cluster.head.processes(DRIVER) if process.cmdline()[1:3] == ["-m", DRIVER]]


def kill(kind: str, cluster: Cluster, rng: random.Random) -> str:
    """Kill one of the kind, and put back what a cluster's owner would; what it was."""
    nodes = [*cluster.workers, cluster.head]
    if kind == "worker" and (processes := [process for node in nodes for process in at_work(node)]):
        process = rng.choice(processes)
        title = process.cmdline()[0]
        process.kill()
        return f"worker {title.removeprefix('ray::').split(' ')[0][:32]}"
    if kind == "node":
        lost = rng.choice([worker for worker in cluster.workers if at_work(worker)] or cluster.workers)
        cluster.lose_worker(lost)
        cluster.add_worker()
        return f"node {lost.name}"
    if kind == "head":
        lost = cluster.head
        cluster.lose_head()
        return f"head {lost.name}"
    for process in driver_of(cluster):
        process.kill()
    return "driver"


def disturb(
    cluster: Cluster, config: Path, run_dir: Path, args: argparse.Namespace, rng: random.Random, rows: list[Any]
) -> None:
    """One run from corpus to results, with kills as long as it has had few of them; a row for each kill."""
    most = len(STAGES) if args.each_stage else min(args.kills, len(rows) + args.per_run)
    kinds = {"node": 1} if args.each_stage else KINDS
    with (run_dir.parent / f"{run_dir.name}.log").open("w") as log:
        job, submitted, at = submit(cluster, config, run_dir, log), 1, None
        while (code := job.poll()) != 0:
            if code is not None:
                assert submitted <= len(rows) + 3, f"the job fails by itself: see {log.name}"
                job, submitted, at = submit(cluster, config, run_dir, log), submitted + 1, None
            elif len(rows) < most and driver_of(cluster):
                stage = stage_of(run_dir)
                if args.each_stage:
                    begun = (run_dir / stage / "settings.json").exists()  # and what came before it is ended
                    due = begun and stage not in {row[4] for row in rows} and any(map(at_work, cluster.workers))
                else:  # from when the driver runs: what a new head takes to start would kill the next job as it begins
                    at = at or time.monotonic() + rng.uniform(0, 2) * args.pause
                    due = time.monotonic() > at
                if due:
                    kind, at = rng.choices(list(kinds), list(kinds.values()))[0], None
                    before = finished(run_dir)
                    what = kill(kind, cluster, rng)
                    rows.append([len(rows) + 1, run_dir.name, submitted, what, stage, kept(run_dir), before])
                    Console().print(*map(str, rows[-1][:-1]), sep=" | ")
            time.sleep(0.2)
    for row in rows:
        if row[1] == run_dir.name:
            now = finished(run_dir)
            changed = [Path(name).parent.name for name, when in row.pop().items() if now[name] != when]
            row.append(", ".join(changed) or "nothing")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=4, help="kills after which a run is left to finish")
    parser.add_argument("--each-stage", action="store_true", help="not --kills: one run, a worker node in every stage")
    parser.add_argument("--pause", type=float, default=20, help="mean seconds of a driver's life before a kill")
    parser.add_argument("--steps", type=int, default=500, help="of the seed and of each expert")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    args = parser.parse_args()
    rng, rows, same, console = random.Random(args.seed), list[Any](), list[bool](), Console(width=160)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    console.print(f"logs and runs: {folder}")
    config = write_config(folder, args)
    with network(folder) as net:
        cluster = Cluster(net)
        with (folder / "calm.log").open("w") as log:
            assert submit(cluster, config, folder / "calm", log).wait() == 0, "the undisturbed run failed"
        calm = artifacts(str(folder / "calm"))
        while not same if args.each_stage else len(rows) < args.kills:
            run_dir = folder / f"run-{len(same) + 1}"
            disturb(cluster, config, run_dir, args, rng, rows)
            same.append(artifacts(str(run_dir)) == calm)
    table = Table("kill", "run", "submission", "killed", "in stage", "kept of it", "finished before, made again")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
    kinds = Counter(row[3].split()[0] for row in rows)
    print(json.dumps({"kills": len(rows), **kinds, "runs": len(same), "artifacts": len(calm), "same": all(same)}))


if __name__ == "__main__":
    main()
