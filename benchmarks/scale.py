"""Many small experts on few slots: python -m benchmarks.scale [--k 8 32 128 --slots 8 --steps 600]

    K experts

A slot is a CPU that Ray counts, whether the machine has it or not: without that many cores they stand in for GPUs in what
is looked at, which is how well the slots are kept at work and what an expert costs beside its steps. Not how fast it trains.
What can overlap is `lanes`: the slots, or the machine's cores where those are fewer.

    ideal            K x seconds of an expert's steps but the first / lanes. The seconds are those of our loop in as many
                     processes as there are lanes, without Ray, before and after all else
    fixed tax        makespan of K experts of one step each x lanes / K: Ray, imports, reading, the model's files
    makespan ratio   (makespan of K experts of all steps - makespan of K experts of one step) / ideal
    slots ratio      the same over an ideal of the slots' own: seconds that the experts of all steps took where they were
                     trained, less those of one step, / slots. How slots are kept at work, however fast what is in them

Starting and ending take computing as steps do, so the two makespans can be subtracted; where they take waiting instead,
other experts' steps fill it, and the ratio may fall below 1. Memory is what would be free without the processes, at its peak:
the driver's, that of the head's services, of the runs' own helpers (controllers), and of the training workers. Every
measurement has a process and a Ray of its own. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.faults import arguments
from benchmarks.training import SIZES, WARM_STEPS, make_documents, make_model, make_run, make_spec, our_loop
from cbtm_ray.branch.branches import expert_branches
from cbtm_ray.branch.launch import train_branches
from cbtm_ray.ray_session import ray_session
from cbtm_ray.train.packed_sequences import PackedSequences

HEAD = ("gcs_server", "raylet/raylet", "dashboard", "log_monitor", "monitor.py")
SAMPLE_S = 5.0


def lanes(args: argparse.Namespace) -> int:
    return min(args.slots, psutil.cpu_count())


def seconds_of_steps(args: argparse.Namespace) -> float:
    """Seconds of an expert's steps but the first, in this process."""
    torch.set_num_threads(1)
    spec = make_spec(args.steps - 1 + WARM_STEPS, args)
    documents = make_documents(spec.steps * spec.tokens_per_step, SIZES[args.sizes[0]]["vocab_size"], args.seed)
    sequences = PackedSequences(documents, sequence_length=args.length, end_of_text=0, seed=args.seed)
    return our_loop(make_model(SIZES[args.sizes[0]], args), sequences, spec)


def without_ray(args: argparse.Namespace) -> float:
    """The mean of one such process in every lane."""
    with multiprocessing.get_context("spawn").Pool(lanes(args)) as pool:
        return mean(pool.map(seconds_of_steps, [args] * lanes(args), chunksize=1))


def unshared_mib(processes: list[psutil.Process]) -> float:
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # they come and go meanwhile
            total += process.memory_full_info().uss
    return total / 2**20


def ray_processes() -> dict[str, list[psutil.Process]]:
    """This process and all that it has started, by what they are for."""
    found: dict[str, list[psutil.Process]] = {"driver": [psutil.Process()], "head": [], "helpers": [], "workers": []}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            kind = "head" if any(name in command for name in HEAD) else "helpers"
            found["workers" if "RayTrainWorker" in command else kind].append(process)
    return found


def watch_memory(over: threading.Event, peak: dict[str, float]) -> None:
    while not over.wait(SAMPLE_S):
        for kind, processes in ray_processes().items():
            peak[kind] = max(peak.get(kind, 0.0), unshared_mib(processes))


def measure(k: int, args: argparse.Namespace) -> dict[str, float]:
    """K experts trained once, in this process: seconds until all are done and those that experts took, summed; memory."""
    peak, over = dict[str, float](), threading.Event()
    with tempfile.TemporaryDirectory() as folder, ray_session(local_cpus=args.slots):
        run = make_run(Path(folder), argparse.Namespace(**vars(args), ray_steps=args.steps), n_clusters=k)
        experts = [each for each in expert_branches(run) if each.cluster is not None]
        watcher = threading.Thread(target=watch_memory, args=(over, peak), daemon=True)
        watcher.start()
        started = time.perf_counter()
        train_branches(run, experts, title=f"K = {k}", cpus=1, slots=args.slots, per_run=per_run(k, args))
        makespan = time.perf_counter() - started
        over.set()
        watcher.join()
        busy = sum(run.require(each.spec.name, "train_experts")["seconds"] for each in experts)
    return {"makespan_s": makespan, "busy_s": busy, **{f"{kind}_mib": mib for kind, mib in peak.items()}}


def per_run(k: int, args: argparse.Namespace) -> int:
    """Experts that one Ray Train run trains: two runs a slot at the most, unless it is said."""
    return args.per_run or max(1, k // (2 * args.slots))


def in_its_own_process(k: int, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale", *sys.argv[1:], f"--steps={steps}", "--only", f"--k={k}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--k", type=int, nargs="+", default=[8, 32, 128], help="experts")
    parser.add_argument("--slots", type=int, default=8, help="Ray Train runs at once")
    parser.add_argument("--per-run", type=int, help="experts that one Ray Train run trains (K / 16, at least 1)")
    parser.add_argument("--steps", type=int, default=600, help="of an expert")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--length", type=int, default=64, help="tokens in a sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="store_true", help="one K's makespan and memory, nothing else")
    return arguments(parser)


def main() -> None:
    args, console = parse_args(), Console(width=140)
    if args.only:
        print(json.dumps(measure(args.k[0], args)))
        return
    before = without_ray(args)
    found = {k: (in_its_own_process(k, 1), in_its_own_process(k, args.steps)) for k in args.k}
    after = without_ray(args)
    console.print(
        f"{args.slots} slots, {lanes(args)} lanes, {args.steps} steps of {args.batch} x {args.length} tokens, seed "
        f"{args.seed}; seconds of them without Ray: {before:.2f} before, {after:.2f} after"
    )
    memory = ("driver_mib", "head_mib", "helpers_mib", "workers_mib")
    table = Table(
        "K", "runs", "one step, s", "all steps, s", "ideal, s", "ratio", "slots' ratio", "fixed tax, s", *memory
    )
    rows = []
    for k, (one, all_steps) in found.items():
        ideal, tax = k * (before + after) / 2 / lanes(args), one["makespan_s"] * lanes(args) / k
        steps = all_steps["makespan_s"] - one["makespan_s"]
        ratio, of_slots = steps / ideal, steps / (all_steps["busy_s"] - one["busy_s"]) * args.slots
        rows.append(
            {"k": k, "makespan_ratio": round(ratio, 3), "slots_ratio": round(of_slots, 3), "fixed_tax_s": round(tax, 2)}
        )
        table.add_row(
            str(k), str(-(-k // per_run(k, args))), f"{one['makespan_s']:.1f}", f"{all_steps['makespan_s']:.1f}",
            f"{ideal:.1f}", f"{ratio:.3f}", f"{of_slots:.3f}", f"{tax:.2f}", *(f"{all_steps[kind]:.0f}" for kind in memory),
        )  # fmt: skip
    console.print(table)
    first, last = args.k[0], args.k[-1]
    growth = (found[last][1]["driver_mib"] - found[first][1]["driver_mib"]) / max(1, last - first)
    print(json.dumps({**rows[-1], "driver_mib_per_expert": round(growth, 3), "rows": rows}))


if __name__ == "__main__":
    main()
