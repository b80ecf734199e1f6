"""Decoding with the ensemble beside one expert in Hugging Face's generate: python -m benchmarks.decoding [--rounds 3]

Two tables. Speed: tokens a second of every strategy and of one expert with the same weights, whose turns alternate, so that
a busy machine slows all; `--clock cpu` counts the seconds that this process computed, for machines that others use too.
Acceptance: how many drafts speculative sampling accepts, and how many tokens it gets a round, by the drafting expert's weight.
Experts are one random model, whose logits are scaled until it is about as sure as a small language model, with noise of each
expert's own. The last line of the output is one JSON object, of one sequence at a time with the largest size.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cbtm_ray.cluster.embed import TokenTfidf
from cbtm_ray.decode.engine import Engine
from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request, Step
from cbtm_ray.decode.speculative import Speculative
from cbtm_ray.decode.strategies import STRATEGIES
from cbtm_ray.merge.ensemble import Ensemble
from cbtm_ray.merge.routers import Route

SIZES: dict[str, dict[str, Any]] = {
    "quickstart": {"vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                   "intermediate_size": 256},
    "10M": {"vocab_size": 8192, "hidden_size": 320, "num_hidden_layers": 6, "num_attention_heads": 5,
            "intermediate_size": 896},
}  # fmt: skip
N_EXPERTS = 4
NOISE = 0.3
"""Standard deviation of an expert's own weights against that of the weights it shares."""


class Counted(Speculative):
    """Speculative sampling that says what became of its drafts."""

    rounds: ClassVar[list[tuple[int, int]]] = []
    """Of each round the drafts, and the tokens: those that were accepted, and one more."""

    def advance(self) -> list[Step]:
        drafts, steps = len(self.sequence.drafts), super().advance()
        if steps:
            self.rounds.append((drafts, len(steps)))
        return steps


def make_experts(size: str, seed: int, device: str = "cpu") -> list[PreTrainedModel]:
    config = LlamaConfig(**SIZES[size], max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=None)
    torch.manual_seed(seed)
    shared = LlamaForCausalLM(config).state_dict()
    experts = []
    for _ in range(N_EXPERTS):
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.data = shared[name] + NOISE * parameter.data
        # Logits of a random model hardly differ; these have a standard deviation of about 3.
        model.model.norm.weight.data *= 3 / (config.hidden_size**0.5 * 0.02)
        experts.append(torch.nn.Module.to(model.eval(), device))
    return experts


def make_ensemble(experts: list[PreTrainedModel], weights: list[float]) -> Ensemble:
    """Experts with the same weights at every token: contexts all lie at 0, centers at the distances that give them."""
    distances_K = -np.log(np.maximum(weights, 1e-9))
    centers_KK = np.diag(np.sqrt(distances_K - distances_K.min()))
    settings = {"temperature": 1.0}
    return Ensemble(
        experts=dict(enumerate(experts)),
        model_config=experts[0].config,
        embedder=TokenTfidf(np.zeros((experts[0].config.vocab_size, len(weights)))),
        centers_KD=torch.from_numpy(centers_KK.astype(np.float32)),
        end_of_text=0,
        routes={
            top_k: Route(routing="embedding", top_k=top_k, settings=settings, prefix_tokens=0)
            for top_k in range(1, len(weights) + 1)
        },
    )


def top_weights(top: float, top_k: int) -> list[float]:
    """The drafting expert's, and the others' of top_k alike."""
    others = (1 - top) / (top_k - 1)
    return [top, *[others] * (top_k - 1), *[0.0] * (N_EXPERTS - top_k)]


def make_prompts(batch: int, args: argparse.Namespace, vocabulary: int) -> list[list[int]]:
    return np.random.default_rng(args.seed).integers(1, vocabulary, (batch, args.prompt)).tolist()


Decoder = Callable[[], int]
"""Decodes the batch, and says how many tokens came of it."""


def hugging_face(model: Any, prompts: list[list[int]], args: argparse.Namespace) -> Decoder:
    input_ids = torch.tensor(prompts, device=model.device)

    def decode() -> int:
        torch.manual_seed(args.seed)
        found = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=args.tokens, do_sample=True, top_k=0,
            pad_token_id=0,
        )  # fmt: skip
        return found.shape[0] * (found.shape[1] - args.prompt)

    return decode


def ours(ensemble: Ensemble, strategy: str, top_k: int, prompts: list[list[int]], args: argparse.Namespace) -> Decoder:
    def decode() -> int:
        room = len(prompts) * (args.prompt + args.tokens)
        engine, tokens = Engine(ensemble, max_sequences=len(prompts), cache_tokens=room), 0
        for row, prompt in enumerate(prompts):
            sampling = Sampling(seed=args.seed + row)
            engine.add(
                Request(prompt=prompt, max_tokens=args.tokens, top_k=top_k, sampling=sampling, strategy=strategy)
            )
        while engine.running or engine.waiting:
            tokens += len(engine.step())
        return tokens

    return decode


def compare_speed(size: str, batch: int, args: argparse.Namespace, table: Table) -> dict[str, float]:
    """Tokens a second over those of Hugging Face's generate, the best of all rounds each."""
    experts = make_experts(size, args.seed, args.device)
    prompts = make_prompts(batch, args, experts[0].config.vocab_size)
    decoders = {"one expert, HF generate": hugging_face(experts[0], prompts, args)}
    for top_k in (2, 4):
        ensemble = make_ensemble(experts, top_weights(args.top_weight, top_k))
        for strategy in ("lockstep", "ancestral", "speculative"):
            decoders[f"{strategy}_top{top_k}"] = ours(ensemble, strategy, top_k, prompts, args)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    speeds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(args.rounds):
        for name, decode in decoders.items():
            started = clock()
            tokens = decode()
            speeds[name].append(tokens / (clock() - started))
    best = {name: max(found) for name, found in speeds.items()}
    one = best.pop("one expert, HF generate")
    table.add_row(size, str(batch), "one expert, HF generate", f"{one:,.0f}", "1.00")
    for name, speed in best.items():
        table.add_row(size, str(batch), name.replace("_", ", "), f"{speed:,.0f}", f"{speed / one:.2f}")
    return {f"{name}_ratio": round(speed / one, 3) for name, speed in best.items()}


def compare_acceptance(size: str, args: argparse.Namespace, table: Table) -> None:
    """What becomes of the drafts of speculative sampling with top-2."""
    STRATEGIES["counted"] = Counted
    experts = make_experts(size, args.seed, args.device)
    prompt = make_prompts(1, args, experts[0].config.vocab_size)[0]
    for top in (0.5, 0.7, 0.9, 0.99):
        for temperature in (1.0, 0.0):
            engine = Engine(make_ensemble(experts, top_weights(top, 2)), max_sequences=1, cache_tokens=1000)
            sampling = Sampling(seed=args.seed, temperature=temperature)
            engine.add(Request(prompt=prompt, max_tokens=args.tokens, top_k=2, sampling=sampling, strategy="counted"))
            Counted.rounds.clear()
            while engine.running or engine.waiting:
                engine.step()
            drafts, tokens = map(sum, zip(*Counted.rounds, strict=True))
            rounds = len(Counted.rounds)
            share = f"{(tokens - rounds) / max(drafts, 1):.0%} of {drafts}"
            table.add_row(size, f"{top:g}", f"{temperature:g}", share, f"{tokens / rounds:.2f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1, 8], help="sequences at once; the first is reported"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns that each has, the best of which counts")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--top-weight", type=float, default=0.7, help="weight of the first expert")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads, for all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console()
    torch.set_num_threads(args.threads)
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    console.print(
        f"prompt {args.prompt}, answer {args.tokens} tokens, weight {args.top_weight:g} of the first expert, "
        f"{args.threads} threads, {args.clock} clock, seed {args.seed}; load before: {load}"
    )
    speed = Table("size", "batch", "decoding", "tokens/s", "of one expert")
    ratios = [compare_speed(size, batch, args, speed) for size in args.sizes for batch in args.batches]
    console.print(speed)
    acceptance = Table("size", "weight", "temperature", "drafts accepted", "tokens a round", title="speculative, top-2")
    for size in args.sizes:
        compare_acceptance(size, args, acceptance)
    console.print(acceptance)
    reported = ratios[-len(args.batches)]
    names = ("lockstep_top4_ratio", "ancestral_top2_ratio", "ancestral_top4_ratio", "speculative_top4_ratio")
    print(json.dumps({name: reported[name] for name in names}))


if __name__ == "__main__":
    main()
