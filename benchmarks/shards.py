"""A corpus of many small files through its stages: python -m benchmarks.shards [--shards 1000 --documents 20]

Seconds of build_corpus, fit_clusters and partition_corpus, the driver's memory before and after each, and the largest that
any of Ray's workers had. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from cbtm_ray.load_config import build_config
from cbtm_ray.ray_session import ray_session
from cbtm_ray.run import Run

STAGES = ("build_corpus", "fit_clusters", "partition_corpus")
VOCABULARY = 2000


def write_shards(folder: Path, args: argparse.Namespace) -> Path:
    """JSONL files of documents of 50 words each, whose words say which of K topics they are of."""
    rng = np.random.default_rng(args.seed)
    words = np.array(["".join(letters) for letters in rng.choice(list("abcdefghijklmnopqrstuvwxyz"), (VOCABULARY, 6))])
    folder.mkdir()
    for shard in range(args.shards):
        lines = []
        for row in range(args.documents):
            topic = words[rng.integers(args.k) :: args.k]
            lines.append(json.dumps({"id": f"{shard}-{row}", "text": " ".join(rng.choice(topic, 50))}))
        (folder / f"part-{shard:05d}.jsonl").write_text("\n".join(lines))
    return folder


def resident_mib(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def watch_workers(over: threading.Event, peak: list[float]) -> None:
    while not over.wait(1):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ray::" in " ".join(process.cmdline()):
                    peak.append(resident_mib(process))


def measure(stage: str, run: Run) -> dict[str, Any]:
    from cbtm_ray import pipeline  # imports Ray, which ray_session has to do first

    over, peak, driver = threading.Event(), [0.0], psutil.Process()
    watcher = threading.Thread(target=watch_workers, args=(over, peak), daemon=True)
    before, started = resident_mib(driver), time.perf_counter()
    watcher.start()
    pipeline.run_job(run, stage)
    seconds = time.perf_counter() - started
    over.set()
    watcher.join()
    return {
        "s": round(seconds, 1),
        "driver_before_mib": round(before),
        "driver_after_mib": round(resident_mib(driver)),
        "largest_worker_mib": round(max(peak)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=1000, help="files")
    parser.add_argument("--documents", type=int, default=20, help="documents in a file")
    parser.add_argument("--k", type=int, default=8, help="clusters")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_session():
        tree = {
            "run": {"dir": f"{folder}/run", "seed": args.seed},
            "corpus": {"paths": [str(write_shards(Path(folder, "corpus"), args))], "id_column": "id"},
            "cluster": {"n_clusters": args.k},
            "seed_model": {"train_tokens": 1},
        }
        run = Run(build_config(tree))
        run.open()
        found = {stage: measure(stage, run) for stage in STAGES}
    table = Table("stage", *found[STAGES[0]])
    for stage, row in found.items():
        table.add_row(stage, *map(str, row.values()))
    console = Console(width=120)
    console.print(f"{args.shards} files of {args.documents} documents, K = {args.k}, seed {args.seed}")
    console.print(table)
    print(json.dumps({f"{stage}_{name}": value for stage, row in found.items() for name, value in row.items()}))


if __name__ == "__main__":
    main()
