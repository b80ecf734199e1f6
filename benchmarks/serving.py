"""The endpoint under 1, 8 and 32 streams: python -m benchmarks.serving [--run DIR] [--seconds 10]

One deployment answers as the ensemble, with top-1, 2 and 4, and as one expert: the dense control, an ensemble of one in the
same engine. Beside it stands Hugging Face's generate behind FastAPI (benchmarks/hf_server.py) with that control. Without
--run, a run of random experts is made; its experts agree as little as experts of one seed do, see benchmarks/decoding.py.
Every system has one process for its models with one thread of torch, and --seconds for every number of streams; streams
ask again and again until then. The router's share is that of an engine's time that goes to embedding and weights, in this
process. The last line of the output is one JSON object, of the most streams.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from ray import serve
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks.served_run import make_run, parser, read_texts
from benchmarks.streams import Load, measure
from cbtm_ray import files
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.decode.engine import Engine
from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request
from cbtm_ray.merge.context_router import ContextRouter
from cbtm_ray.merge.ensemble import load_ensemble
from cbtm_ray.ray_session import ray_session
from cbtm_ray.stages import DENSE_FOLDER
from serve.app import build
from serve.arguments import AppArguments

CACHE_TOKENS = 32768


@contextlib.contextmanager
def our_server(run_dir: str, port: int, **arguments: Any) -> Iterator[str]:
    """The whole application on a Ray of its own; the address of its completions."""
    os.environ["RAY_SERVE_PROXY_USE_GRPC"] = "1"  # as `make serve` has it
    with ray_session(local_cpus=2):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(AppArguments(run_dir=run_dir, cache_tokens=CACHE_TOKENS, **arguments)), route_prefix="/")
        yield f"http://127.0.0.1:{port}/v1/completions"
        serve.shutdown()


@contextlib.contextmanager
def peer_server(run_dir: str, args: argparse.Namespace) -> Iterator[str]:
    port = args.port + 1
    with files.local_folder(files.join(run_dir, DENSE_FOLDER)) as folder:
        command = [sys.executable, "-m", "benchmarks.hf_server", folder, "--port", str(port)]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while not answers(url):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("the peer did not start")
                time.sleep(0.2)
            yield f"{url}/v1/completions"
        finally:
            process.terminate()
            process.wait()


def answers(url: str) -> bool:
    try:
        httpx.get(url)
    except httpx.TransportError:
        return False
    return True


def make_prompts(run_dir: str, n_tokens: int) -> list[str]:
    """Texts of about so many tokens."""
    tokenizer = load_tokenizer(files.join(run_dir, "tokenizer"))
    documents = encode(tokenizer, read_texts()[:200])
    return [str(tokenizer.decode(tokens[:n_tokens])) for tokens in documents if len(tokens) >= n_tokens]


def compare(run_dir: str, args: argparse.Namespace) -> dict[tuple[str, int], Load]:
    """Every system with every number of streams; systems take turns, so that a busy machine slows all."""
    body: dict[str, Any] = {"max_tokens": args.tokens, "temperature": 1.0}
    ours = {**body, "stream": True, "stream_options": {"include_usage": True}}
    prompts, found = make_prompts(run_dir, args.prompt), {}
    with our_server(run_dir, args.port, max_sequences=max(args.streams)) as url, peer_server(run_dir, args) as peer:
        experts = len(httpx.get(url.replace("completions", "experts")).json()["data"])
        systems: dict[str, tuple[str, dict[str, Any]]] = {
            "one expert, same engine": (url, {**ours, "model": "dense"}),
            "one expert, HF generate": (peer, body),
        }
        for top_k in (1, 2, 4):
            if top_k <= experts:
                systems[f"top-{top_k}"] = url, {**ours, "model": "cbtm", "cbtm": {"top_k": top_k}}
        for address, wanted in systems.values():  # first calls are slow
            measure(address, wanted, prompts, 1, 0.1)
        for n_streams in args.streams:
            for name, (address, wanted) in systems.items():
                found[name, n_streams] = measure(address, wanted, prompts, n_streams, args.seconds)
    return found


def router_share(run_dir: str, args: argparse.Namespace) -> float:
    """Of an engine's time with the most streams and top-2: the share of the router's calls."""
    spent = [0.0]

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                spent[0] += time.perf_counter() - started

        return run

    for name in ("weights", "append"):
        setattr(ContextRouter, name, timed(getattr(ContextRouter, name)))
    ensemble, tokenizer = load_ensemble(run_dir)
    prompts = encode(tokenizer, make_prompts(run_dir, args.prompt)[: max(args.streams)])
    engine = Engine(ensemble, max_sequences=len(prompts), cache_tokens=CACHE_TOKENS)
    top_k = min(2, ensemble.n_experts)
    for seed, prompt in enumerate(prompts):
        sampling = Sampling(seed=seed)
        engine.add(Request(prompt=prompt.tolist(), max_tokens=args.tokens, top_k=top_k, sampling=sampling))
    started, spent[0] = time.perf_counter(), 0.0
    while engine.running or engine.waiting:
        engine.step()
    return spent[0] / (time.perf_counter() - started)


def parse_args() -> argparse.Namespace:
    known = parser(__doc__, tokens=64, port=8900)
    known.add_argument("--run", help="a finished run with the dense control; without it, random experts")
    known.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32], help="the last is reported")
    known.add_argument("--seconds", type=float, default=10, help="of every system with every number of streams")
    return known.parse_args()


def main() -> None:
    args, console = parse_args(), Console()
    torch.set_num_threads(1)
    disable_progress_bar()
    console.print("load before: " + ", ".join(f"{average:.1f}" for average in os.getloadavg()))
    with tempfile.TemporaryDirectory() as folder:
        run_dir = files.absolute(args.run) if args.run else make_run(Path(folder), args.size, args.seed)
        found = compare(run_dir, args)
        share = router_share(run_dir, args)
    table = Table("streams", "system", "tokens/s", "first token, ms", "between tokens, ms", "answers")
    for (name, n_streams), load in found.items():
        latencies = f"{load.ttft_p50_s * 1000:.0f}", f"{load.itl_p50_s * 1000:.1f}"
        table.add_row(str(n_streams), name, f"{load.tokens_per_s:,.0f}", *latencies, str(load.answers))
    console.print(table)
    last = args.streams[-1]
    top_2, one = found["top-2", last], found["one expert, same engine", last].tokens_per_s
    print(
        json.dumps(
            {
                "streams32_top1_ratio": round(found["top-1", last].tokens_per_s / one, 3),
                "streams32_top2_ratio": round(top_2.tokens_per_s / one, 3),
                "streams32_peer_ratio": round(
                    top_2.tokens_per_s / found["one expert, HF generate", last].tokens_per_s, 3
                ),
                "router_share": round(share, 4),
                "ttft_p50_s": round(top_2.ttft_p50_s, 4),
                "itl_p50_s": round(top_2.itl_p50_s, 5),
            }
        )
    )


if __name__ == "__main__":
    main()
