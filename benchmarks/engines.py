"""Stock vLLM behind the router, beside stock vLLM alone and our own engine: python -m benchmarks.engines [--run DIR]

Every system answers 1, 8 and 32 clients that ask again and again: for whole answers, whose tokens/s are compared, and for
streamed ones, whose time to the first token is. One expert in stock vLLM stands against the endpoint with engine=vllm and
with our own engine, top-1 and top-2. Prompts are of the texts that the router sends to one expert at their end, so that one
engine does the work as in stock vLLM; "all experts" are prompts of all texts, over as many engines as there are experts on
the same cores. Needs .venv-vllm (make .venv-vllm/cpu). Servers run one after the other. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks.served_run import make_run, parser
from benchmarks.serving import CACHE_TOKENS, make_prompts, our_server
from benchmarks.streams import Load, measure
from benchmarks.vllm_servers import our_vllm, stock_vllm
from cbtm_ray import files
from cbtm_ray.corpus.tokenizer import encode
from cbtm_ray.merge.ensemble import load_ensemble
from cbtm_ray.stages import expert_folder
from serve.vllm_calls import cache_bytes

STOCK, OURS, OURS_ALL = "stock vLLM, one expert", "engine=vllm, one expert's prompts", "engine=vllm, all experts"
OWN_1, OWN_2 = "own engine, top-1", "own engine, top-2"
Found = dict[tuple[str, int], tuple[Load, Load]]
"""By system and clients: whole answers, and streamed ones."""


def prompts_of_one(run_dir: str, n_tokens: int) -> tuple[list[str], int]:
    """The prompts that the router sends to the expert with most of them, and that expert."""
    ensemble, tokenizer = load_ensemble(run_dir, [])
    prompts, chosen = make_prompts(run_dir, n_tokens), []
    for tokens in encode(tokenizer, prompts):
        router = ensemble.router(1, range(ensemble.n_experts))
        router.append(tokens.tolist())
        chosen.append(router.running[0])
    expert = Counter(chosen).most_common(1)[0][0]
    return [prompt for prompt, one in zip(prompts, chosen, strict=True) if one == expert], expert


def load_of(url: str, body: dict[str, Any], prompts: list[str], n_streams: int, seconds: float) -> tuple[Load, Load]:
    """What clients of whole answers see, and clients of streamed ones."""
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    return (
        measure(url, body, prompts, n_streams, seconds, whole=True),
        measure(url, streamed, prompts, n_streams, seconds),
    )


def compare(run_dir: str, args: argparse.Namespace) -> Found:
    """Every system with every number of clients."""
    one, expert = prompts_of_one(run_dir, args.prompt)
    everything, most = make_prompts(run_dir, args.prompt), max(args.streams)
    with files.local_folder(files.join(run_dir, expert_folder(expert))) as folder:
        ensemble, _ = load_ensemble(run_dir, [])
        room = CACHE_TOKENS * cache_bytes(ensemble.model_config, "float32")
        stock = stock_vllm(folder, args.port + 1, max_sequences=most, cache_bytes=room)
        found = _measure(lambda: stock, {STOCK: ({"model": "expert"}, one)}, args)
    options: dict[str, Any] = {"max_sequences": most, "dense": False}
    top_1, top_2 = ({"model": "cbtm", "cbtm": {"top_k": top_k}} for top_k in (1, 2))
    share = 1.0 / ensemble.n_experts
    found |= _measure(
        lambda: our_vllm(run_dir, args.port, group_cpus=share, cache_tokens=CACHE_TOKENS, **options),
        {OURS: (top_1, one), OURS_ALL: (top_1, everything)},
        args,
    )
    found |= _measure(
        lambda: our_server(run_dir, args.port, **options),
        {OWN_1: (top_1, one), OWN_2: (top_2, one)},
        args,
    )
    return found


def _measure(
    server: Callable[[], AbstractContextManager[str]],
    systems: dict[str, tuple[dict[str, Any], list[str]]],
    args: argparse.Namespace,
) -> Found:
    found: Found = {}
    with server() as url:
        for body, prompts in systems.values():  # engines may be starting, and first calls are slow
            measure(url, {**body, "max_tokens": args.tokens}, prompts[:64], 16, 2.0, whole=True)
        for n_streams in args.streams:
            for name, (body, prompts) in systems.items():
                asked = {**body, "max_tokens": args.tokens, "temperature": 1.0}
                found[name, n_streams] = load_of(url, asked, prompts, n_streams, args.seconds)
    return found


def main() -> None:
    known = parser(__doc__, tokens=64, port=8950)
    known.add_argument("--run", help="a finished run; without it, four random experts")
    known.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32], help="the last is reported")
    known.add_argument("--seconds", type=float, default=8, help="of every system with every number of clients, twice")
    args, console = known.parse_args(), Console()
    disable_progress_bar()
    console.print("load before: " + ", ".join(f"{average:.1f}" for average in os.getloadavg()))
    with tempfile.TemporaryDirectory() as folder:
        found = compare(files.absolute(args.run) if args.run else make_run(Path(folder), args.size, args.seed), args)
    table = Table("clients", "system", "tokens/s, whole", "tokens/s, streamed", "first token, ms", "answers")
    for (name, n_streams), (whole, streamed) in sorted(found.items(), key=lambda item: item[0][1]):
        speeds = f"{whole.tokens_per_s:,.0f}", f"{streamed.tokens_per_s:,.0f}"
        table.add_row(str(n_streams), name, *speeds, f"{streamed.ttft_p50_s * 1000:.1f}", str(whole.answers))
    console.print(table)
    last, first = args.streams[-1], args.streams[0]

    def ratio(name: str) -> float:
        return round(found[name, last][0].tokens_per_s / found[STOCK, last][0].tokens_per_s, 3)

    extra_s = found[OURS, first][1].ttft_p50_s - found[STOCK, first][1].ttft_p50_s
    print(
        json.dumps(
            {
                "vllm_tokens_per_s_32": round(found[STOCK, last][0].tokens_per_s),
                "ours_vllm_ratio_32": ratio(OURS),
                "ours_vllm_all_experts_ratio_32": ratio(OURS_ALL),
                "ttft_extra_ms": round(extra_s * 1000, 1),
                "own_top1_ratio_32": ratio(OWN_1),
                "own_top2_ratio_32": ratio(OWN_2),
            }
        )
    )


if __name__ == "__main__":
    main()
