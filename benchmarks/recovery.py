"""How long answers pause when a process of the endpoint is killed: python -m benchmarks.recovery [--run DIR] [--streams 8]

Greedy streams run side by side twice: left alone, and with SIGKILL of the replica that holds the experts in the middle of
them. Then the gateway, which their connections end in, is killed in the middle of a third time. Without --run experts are
random, see benchmarks/served_run.py. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from benchmarks.served_run import make_run, parser, replicas
from benchmarks.serving import make_prompts, our_server
from benchmarks.streams import ANSWER_S
from cbtm_ray import files

KILLED_AFTER = 8
"""Pieces of text that every stream has got before the kill."""


@dataclass
class Stream:
    text: str = ""
    arrived_s: list[float] = field(default_factory=list)
    end: str = "broken off"


async def read(client: httpx.AsyncClient, url: str, body: dict[str, Any], stream: Stream) -> None:
    """One stream to its end, whatever that is."""
    try:
        async with client.stream("POST", url, json=body) as response:
            stream.end = f"status {response.status_code}"
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                event = {} if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))
                if "error" in event:
                    stream.end = f"error {event['error']['code']}"
                elif not event:
                    stream.end = "whole"
                elif event["choices"] and (piece := event["choices"][0]["text"]):
                    stream.text += piece
                    stream.arrived_s.append(time.perf_counter())
    except httpx.TransportError as error:
        stream.end = type(error).__name__


async def read_all(url: str, bodies: list[dict[str, Any]], victim: str | None) -> tuple[list[Stream], float]:
    """All streams side by side, and when the victim was killed."""
    streams, killed_s = [Stream() for _ in bodies], 0.0
    async with httpx.AsyncClient(timeout=ANSWER_S) as client:
        reading = [asyncio.create_task(read(client, url, body, one)) for body, one in zip(bodies, streams, strict=True)]
        if victim:
            (process,) = replicas(victim)
            while min(len(stream.arrived_s) for stream in streams) < KILLED_AFTER:
                await asyncio.sleep(0.01)
            process.kill()
            killed_s = time.perf_counter()
        await asyncio.gather(*reading)
    return streams, killed_s


def longest_pause_s(stream: Stream, killed_s: float) -> float:
    """Between two pieces, from the last before the kill on."""
    late = [at for at in stream.arrived_s if at > killed_s]
    return float(np.diff([killed_s, *late]).max()) if late else 0.0


def seconds_until_back(url: str, body: dict[str, Any], killed_s: float) -> float:
    """From the kill until a request begun after it was answered."""
    while True:
        try:
            if httpx.post(url, json=body, timeout=ANSWER_S).status_code == 200:
                return time.perf_counter() - killed_s
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def parse_args() -> argparse.Namespace:
    known = parser(__doc__, tokens=96, port=8920)
    known.add_argument("--run", help="a finished run; without it, random experts")
    known.add_argument("--streams", type=int, default=8)
    return known.parse_args()


def main() -> None:
    args, console = parse_args(), Console()
    disable_progress_bar()
    console.print("load before: " + ", ".join(f"{average:.1f}" for average in os.getloadavg()))
    with tempfile.TemporaryDirectory() as folder:
        run_dir = files.absolute(args.run) if args.run else make_run(Path(folder), args.size, args.seed)
        prompts = make_prompts(run_dir, args.prompt)[: args.streams]
        body = {"model": "cbtm", "max_tokens": args.tokens, "temperature": 0, "cbtm": {"top_k": 2}}
        bodies = [{**body, "prompt": prompt, "stream": True} for prompt in prompts]
        with our_server(run_dir, args.port, max_sequences=args.streams) as url:
            alone, _ = asyncio.run(read_all(url, bodies, None))
            killed, killed_s = asyncio.run(read_all(url, bodies, "ExpertGroup"))
            cut, cut_s = asyncio.run(read_all(url, bodies, "Gateway"))
            back_s = seconds_until_back(url, {**body, "prompt": prompts[0], "max_tokens": 1}, cut_s)
    pauses_s = [longest_pause_s(stream, killed_s) for stream in killed]
    same = sum(a.text == b.text and b.end == "whole" for a, b in zip(alone, killed, strict=True))
    ends = dict(Counter(stream.end for stream in cut))
    console.print(f"experts' replica killed: {same} of {len(killed)} streams ended with the text they would have had")
    console.print(f"pauses from {min(pauses_s):.1f} to {max(pauses_s):.1f} s")
    console.print(f"gateway killed: streams ended as {ends}; the first answer after {back_s:.1f} s")
    print(
        json.dumps(
            {
                "same_texts": same,
                "pause_max_s": round(max(pauses_s), 2),
                "gateway_ends": ends,
                "gateway_back_s": round(back_s, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
