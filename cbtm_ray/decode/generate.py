"""The command line that continues one prompt without a server: `python -m jobs.generate --run RUN --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.style import Style

from cbtm_ray import files
from cbtm_ray.errors import UserError, refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cbtm_ray.decode.sequence import Request, Step
    from cbtm_ray.decode.text import TextAssembler
    from cbtm_ray.merge.ensemble import Ensemble

MAX_TOKENS = 100
COLORS = ("cyan", "green", "yellow", "magenta", "blue", "red", "bright_cyan", "bright_green", "bright_yellow",
          "bright_magenta", "bright_blue", "bright_red")  # fmt: skip


def main(description: str, arguments: list[str] | None = None) -> int:
    """Print the continuation token by token; exit code 0, 2 with one line for a user's mistake, 130 after Ctrl-C."""
    options = _parser(description).parse_args(arguments)
    try:
        _generate(options)
    except UserError as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--run", required=True, metavar="RUN", help="directory of a finished run, a path or URI")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; - reads standard input")
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"most tokens of the answer ({MAX_TOKENS})")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 takes the likeliest token (1)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="share of the probability kept (1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts mixed for a token (those of the served row)")
    parser.add_argument("--routing", help="a router of evaluate.routings (that of the served row)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed draws the same text (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be given again")
    parser.add_argument("--strategy", default="auto", help="auto, lockstep, ancestral or speculative (auto)")
    parser.add_argument(
        "--show-experts", action="store_true", help="color each token by its expert, and name the experts"
    )
    return parser


def _generate(options: argparse.Namespace) -> None:
    # Here and below, what takes seconds to import is imported where it is used: --help does without it.
    from cbtm_ray.decode.engine import generate
    from cbtm_ray.decode.text import TextAssembler

    prompt = _read_prompt(options.prompt)
    ensemble, tokenizer = _load(options.run, options.routing)
    request = _request(options, prompt, ensemble, tokenizer)
    assembler = TextAssembler(tokenizer, options.stop)
    started = time.perf_counter()
    steps = _print(stream_text(generate(ensemble, request), assembler), color=options.show_experts)
    _print_summary(steps, time.perf_counter() - started, options.run if options.show_experts else None)


def _read_prompt(given: str) -> str:
    """The text that is given; of standard input, without the line break that `echo` adds."""
    raw = sys.stdin.buffer.read().removesuffix(b"\n") if given == "-" else given.encode(errors="surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt must be UTF-8, which byte {error.start} is not. Convert it.") from None


def _load(run_dir: str, routing: str | None) -> tuple[Ensemble, PreTrainedTokenizerBase]:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from cbtm_ray.merge.ensemble import load_ensemble

    disable_progress_bar()
    with files.reaching("--run", run_dir):
        return load_ensemble(run_dir, routing=routing, device="cuda" if torch.cuda.is_available() else "cpu")


def _request(
    options: argparse.Namespace, prompt: str, ensemble: Ensemble, tokenizer: PreTrainedTokenizerBase
) -> Request:
    from cbtm_ray.corpus.tokenizer import encode
    from cbtm_ray.decode.sampling import Sampling
    from cbtm_ray.decode.sequence import Request

    token_ids = encode(tokenizer, [prompt])[0].tolist()
    room = max(min(MAX_TOKENS, ensemble.max_length - len(token_ids)), 1)
    return Request(
        prompt=token_ids,
        max_tokens=room if options.max_tokens is None else options.max_tokens,
        top_k=ensemble.served_top_k if options.top_k is None else options.top_k,
        sampling=Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed),
        strategy=options.strategy,
    )


def stream_text(steps: Iterable[Step], assembler: TextAssembler) -> Iterator[tuple[Step, str]]:
    """Each new token with the text that has become certain by it. Ends early after a stop string."""
    for step in steps:
        # The end-of-text token is a token, but no text.
        text = "" if step.finish_reason == "stop" else assembler.push(step.token)
        if step.finish_reason or assembler.stopped:
            text += assembler.finish()
        yield step, text
        if assembler.stopped:
            return


def _print(pieces: Iterable[tuple[Step, str]], *, color: bool) -> list[Step]:
    """Print the text as it comes; the steps. Text that had to wait has the color of the token that made it certain."""
    steps: list[Step] = []
    console = Console()
    color = color and console.color_system is not None and not console.no_color
    for step, text in pieces:
        sys.stdout.write(_style(step.expert).render(text) if color else text)
        sys.stdout.flush()
        steps.append(step)
    print()
    return steps


def _print_summary(steps: list[Step], seconds: float, run_dir: str | None) -> None:
    """Print to stderr what was generated, how fast and by which experts; the experts' terms too where the run is given."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    weights_K = np.mean([step.weights_K for step in steps], axis=0)
    experts = [int(expert) for expert in np.argsort(-weights_K, kind="stable") if weights_K[expert] > 0]
    shares = ", ".join(f"{expert} ({weights_K[expert]:.0%})" for expert in experts)
    speed = f"{len(steps)} tokens in {seconds:.2f} s, {len(steps) / seconds:.1f} tokens/s"
    console.print(f"{speed}; experts by mean weight: {shares}")
    if run_dir is not None:
        clusters = files.read_json(files.join(run_dir, "clusterer", "manifest.json"))["clusters"]
        terms = {row["cluster"]: ", ".join(row["top_terms"]) for row in clusters}
        for expert in experts:
            console.print(f"expert {expert}  {weights_K[expert]:>4.0%}  {terms[expert]}", style=_style(expert))


def _style(expert: int) -> Style:
    return Style(color=COLORS[expert % len(COLORS)])
