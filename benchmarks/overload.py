"""More streams than the endpoint takes: python -m benchmarks.overload [--seconds 60] [--times 4]

First as many streams as a gateway takes on, then `--times` as many, each asking again at once, or a moment after it was
refused. What is looked at: statuses, the time of whole answers against that at capacity, and the memory of Serve's
replicas from a quarter of the time on. Experts are random, see benchmarks/served_run.py. The last line of the output is one
JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks.served_run import make_run, parser, replicas
from benchmarks.serving import make_prompts, our_server
from benchmarks.streams import Answer, keep_asking


def replicas_memory_mib() -> float:
    """Of all replicas together."""
    total = 0
    for process in replicas():
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


def watch_memory(over: threading.Event, found_mib: list[float]) -> None:
    while not over.wait(1):
        found_mib.append(replicas_memory_mib())


def load(
    url: str, body: dict[str, Any], prompts: list[str], n_streams: int, seconds: float
) -> tuple[list[Answer], list[float]]:
    """All answers, and the replicas' memory second by second."""
    over, memory_mib = threading.Event(), list[float]()
    watcher = threading.Thread(target=watch_memory, args=(over, memory_mib))
    watcher.start()
    bodies = ({**body, "prompt": prompt} for prompt in itertools.cycle(prompts))
    try:
        answers, _ = asyncio.run(keep_asking(url, bodies, n_streams, seconds))
    finally:
        over.set()
        watcher.join()
    return answers, memory_mib


def percentile_s(answers: list[Answer], percent: float) -> float:
    return float(
        np.percentile([answer.ended_s - answer.asked_s for answer in answers if answer.status == 200], percent)
    )


def parse_args() -> argparse.Namespace:
    known = parser(__doc__, tokens=48, port=8910)
    known.add_argument("--seconds", type=float, default=60, help="of the overload; half of it at capacity before")
    known.add_argument("--capacity", type=int, default=8, help="max_in_flight of the gateway")
    known.add_argument("--times", type=int, default=4, help="streams over the capacity")
    return known.parse_args()


def main() -> None:
    args, console = parse_args(), Console()
    disable_progress_bar()
    console.print("load before: " + ", ".join(f"{average:.1f}" for average in os.getloadavg()))
    body = {"model": "cbtm", "max_tokens": args.tokens, "stream": True, "stream_options": {"include_usage": True}}
    with tempfile.TemporaryDirectory() as folder:
        run_dir = make_run(Path(folder), args.size, args.seed)
        prompts = make_prompts(run_dir, args.prompt)
        with our_server(run_dir, args.port, max_sequences=args.capacity, max_in_flight=args.capacity) as url:
            calm, _ = load(url, body, prompts, args.capacity, args.seconds / 2)
            full, memory_mib = load(url, body, prompts, args.times * args.capacity, args.seconds)
    table = Table("streams", "answers by status", "p50 of an answer, s", "p99, s")
    for n_streams, answers in ((args.capacity, calm), (args.times * args.capacity, full)):
        statuses = ", ".join(f"{status}: {n}" for status, n in sorted(Counter(one.status for one in answers).items()))
        table.add_row(str(n_streams), statuses, *(f"{percentile_s(answers, percent):.2f}" for percent in (50, 99)))
    console.print(table)
    settled_mib = memory_mib[len(memory_mib) // 4 :]
    found = {
        "only_200_and_503": {answer.status for answer in full} <= {200, 503},
        "refused_share": round(sum(answer.status == 503 for answer in full) / len(full), 3),
        "admitted_p99_ratio": round(percentile_s(full, 99) / percentile_s(calm, 99), 3),
        "memory_mib": round(settled_mib[0]),
        "memory_growth_mib": round(settled_mib[-1] - settled_mib[0], 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
