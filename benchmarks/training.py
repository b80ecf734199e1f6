"""The training loop beside its peers, and through Ray Train beside itself: python -m benchmarks.training [--steps 20]

    B sequences, T tokens, V vocabulary

Two tables. Loops: the same model, data, batch, optimizer and threads in our loop, in Hugging Face's Trainer and in a
minimal loop, alternating, so that a busy machine slows all three. Each turn has a process of its own; ours has the
environment that the job's training processes have, and without it a row of its own. Ray Train: one expert through
cbtm_ray.branch.launch, and the same without it, in a process of the same environment. The last line of the output is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cbtm_ray import files
from cbtm_ray.config import Config, TrainConfig
from cbtm_ray.corpus.tokenizer import save_tokenizer, train_tokenizer
from cbtm_ray.load_config import build_config
from cbtm_ray.manifests import CurvePoint
from cbtm_ray.ray_session import TRAINING_ENV
from cbtm_ray.run import Run
from cbtm_ray.train.packed_sequences import PackedSequences
from cbtm_ray.train.spec import TrainSpec, learning_rate
from cbtm_ray.train.trainer import Trainer, make_optimizer, train_model

SIZES: dict[str, dict[str, Any]] = {
    "1M": {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
           "intermediate_size": 384},
    "10M": {"vocab_size": 8192, "hidden_size": 320, "num_hidden_layers": 6, "num_attention_heads": 5,
            "intermediate_size": 896},
    "135M": {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "intermediate_size": 1536},
}  # fmt: skip
"""The last has SmolLM2-135M's shape. A step of it takes seconds on a CPU, so it is run only where it is asked for."""
LOG_EVERY = 10
WARM_STEPS = 3
"""Steps of a loop that are not timed: compiling is in them."""


def make_model(sizes: dict[str, Any], args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


def make_documents(n_tokens: int, vocab_size: int, seed: int) -> list[np.ndarray]:
    """Documents of about 200 tokens, as skewed as words are; token 0 is left for their ends."""
    rng = np.random.default_rng(seed)
    tokens = 1 + rng.zipf(1.2, size=n_tokens) % (vocab_size - 1)
    return np.array_split(tokens.astype(np.int32), max(n_tokens // 200, 1))


def make_spec(steps: int, args: argparse.Namespace, **train: Any) -> TrainSpec:
    options = TrainConfig(batch_size=args.batch, evaluate_sequences=1, log_every=LOG_EVERY, **train)
    return TrainSpec(name="benchmark", steps=steps, sequence_length=args.length, train=options)


Loop = Callable[[PreTrainedModel, PackedSequences, TrainSpec], float]
"""Trains `spec.steps` steps, and says the seconds of all but the first WARM_STEPS."""


def our_loop(model: PreTrainedModel, sequences: PackedSequences, spec: TrainSpec) -> float:
    trainer, started = Trainer(model, sequences, spec), 0.0
    while trainer.step < spec.steps:
        trainer.train_step()
        if trainer.step % LOG_EVERY == 0:
            trainer.add_point(0.0)
        if trainer.step == WARM_STEPS:
            started = time.perf_counter()
    return time.perf_counter() - started


def minimal_loop(model: PreTrainedModel, sequences: PackedSequences, spec: TrainSpec) -> float:
    """What one would write first: all logits, their cross-entropy, clipping, a fused AdamW."""
    train, started = spec.train, 0.0
    optimizer = make_optimizer(model.train(), train)
    forward: Any = torch.compile(model) if train.compile else model
    for step in range(spec.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step)
        batch = torch.from_numpy(sequences.batch(step * train.batch_size, train.batch_size))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=train.precision == "bf16"):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % LOG_EVERY == 0:
            loss.item()
        if step + 1 == WARM_STEPS:
            started = time.perf_counter()
    return time.perf_counter() - started


def hugging_face_loop(model: PreTrainedModel, sequences: PackedSequences, spec: TrainSpec) -> float:
    import transformers  # the Trainer takes seconds more, and accelerate is optional

    times, train = list[float](), spec.train

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    rows = torch.from_numpy(sequences.batch(0, spec.steps * train.batch_size))[:, :-1]
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            folder, max_steps=spec.steps, per_device_train_batch_size=train.batch_size, optim="adamw_torch_fused",
            learning_rate=train.learning_rate, lr_scheduler_type="linear", warmup_steps=train.warmup_steps,
            adam_beta1=train.betas[0], adam_beta2=train.betas[1], weight_decay=0.0, max_grad_norm=train.clip_norm,
            logging_steps=LOG_EVERY, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False, log_level="error", torch_compile=train.compile, bf16=train.precision == "bf16",
        )  # fmt: skip
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        trainer = transformers.Trainer(model=model, args=options, train_dataset=data, callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return times[-1] - times[WARM_STEPS - 1]


LOOPS: dict[str, tuple[Loop, dict[str, str]]] = {
    "ours": (our_loop, TRAINING_ENV),
    "ours, plain environment": (our_loop, {}),
    "HF Trainer": (hugging_face_loop, {}),
    "minimal": (minimal_loop, {}),
}
"""What takes turns, and what its process has in its environment."""


def in_new_process(environment: dict[str, str], work: Callable[..., Any], *args: Any) -> Any:
    """What the call returns in a process that starts with this beside the present environment."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(work, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def take_turn(loop: Loop, size: str, args: argparse.Namespace) -> float:
    """Tokens a second of a loop."""
    torch.set_num_threads(args.threads)
    spec = make_spec(args.steps + WARM_STEPS, args, precision=args.precision, compile=args.compile)
    documents = make_documents(2 * spec.steps * spec.tokens_per_step, SIZES[size]["vocab_size"], args.seed)
    sequences = PackedSequences(documents, sequence_length=args.length, end_of_text=0, seed=args.seed)
    seconds = loop(make_model(SIZES[size], args), sequences, spec)
    return args.steps * spec.tokens_per_step / seconds


def compare_loops(size: str, args: argparse.Namespace, table: Table) -> dict[str, float]:
    """Our speed over that of every loop, the median of the rounds, in which they take turns. Peers that are missing are said.

    Of the same round, as the speed of a machine changes by more from one to the next than it does within one.
    """
    speeds: dict[str, list[float]] = {name: [] for name in LOOPS}
    n_parameters = make_model(SIZES[size], args).num_parameters()
    for _ in range(args.rounds):
        for name, (loop, environment) in LOOPS.items():
            try:
                speeds[name].append(in_new_process(environment, take_turn, loop, size, args))
            except ImportError as error:
                table.add_row(size, f"{n_parameters:,}", name, f"not run: {str(error).splitlines()[0]}", "", "")
    ratios = {}
    for name, found in speeds.items():
        if found:
            ratios[name] = statistics.median(ours / it for ours, it in zip(speeds["ours"], found, strict=True))
            spread = f"{min(found):,.0f} to {max(found):,.0f}"
            median = f"{statistics.median(found):,.0f}"
            table.add_row(size, f"{n_parameters:,}", name, median, spread, f"{ratios[name]:.2f}")
    return ratios


def make_run(folder: Path, args: argparse.Namespace, n_clusters: int = 1) -> Run:
    """What training experts needs of a run: a tokenizer, shards of the clusters, a seed model of the first size."""
    sizes = SIZES[args.sizes[0]]
    (folder / "documents").mkdir()
    tree = {
        "run": {"dir": str(folder / "run"), "seed": args.seed},
        "corpus": {"paths": [str(folder / "documents")]},
        "tokens": {"sequence_length": args.length},
        "cluster": {"n_clusters": n_clusters},
        "seed_model": {"train_tokens": 1},
        "train": {
            "total_tokens": n_clusters * args.ray_steps * args.batch * args.length,
            "batch_size": args.batch,
            "cpus_per_expert": args.threads,
            "slots": 1,
        },
    }
    run = Run(build_config(tree))
    tokenizer = train_tokenizer(["a few words"], 300)
    save_tokenizer(tokenizer, run.uri("tokenizer"))
    schema = pa.schema({"cluster": pa.int32(), "tokens": pa.list_(pa.int32())})
    n_tokens = args.ray_steps * args.batch * args.length
    for split, count in (("train", n_tokens), ("valid", args.length)):
        with (
            files.writing(run.uri("shards", split, "part-00000.parquet")) as stream,
            pq.ParquetWriter(stream, schema) as file,
        ):
            for k in range(n_clusters):
                documents = make_documents(count, sizes["vocab_size"], args.seed + k)
                file.write_table(pa.table([[k] * len(documents), documents], schema))
    with tempfile.TemporaryDirectory() as seed_folder:
        make_model(sizes, args).save_pretrained(seed_folder)
        files.publish_folder(seed_folder, run.uri("seed"))
    return run


Timed = tuple[float, list[CurvePoint]]
"""Seconds that training an expert took in all, and its curve."""


def train_here(config: Config, threads: int) -> Timed:
    """All that a Ray Train worker does for the only expert, in this process."""
    from cbtm_ray.branch.branches import expert_branches
    from cbtm_ray.branch.worker import read_sequences  # these bring Ray, as the worker's do
    from cbtm_ray.corpus.tokenizer import load_tokenizer
    from cbtm_ray.models import load_model, save_model

    torch.set_num_threads(threads)
    started, run = time.perf_counter(), Run(config)
    branch = expert_branches(run)[1]
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    assert branch.init is not None
    model = load_model(branch.init)
    sequences, valid = read_sequences(run, branch, tokenizer.eos_token_id)
    curve = train_model(
        model, sequences, branch.spec, valid=valid, state=None, save=lambda state: None, log=lambda point: None
    )
    save_model(model, tokenizer, run.uri("here"))
    return time.perf_counter() - started, curve


def train_through_ray(config: Config, threads: int) -> Timed:
    from cbtm_ray.branch.branches import expert_branches
    from cbtm_ray.branch.launch import train_branches  # Ray takes seconds to import

    started, run = time.perf_counter(), Run(config)
    branch = expert_branches(run)[1]
    train_branches(run, [branch], title="benchmark", cpus=threads, slots=1)
    return time.perf_counter() - started, run.require(branch.spec.name, "train_experts")["curve"]


def compare_ray(args: argparse.Namespace, console: Console) -> dict[str, float]:
    """One expert through Ray Train and without it, in turns; a step takes the median over all their stretches."""
    from cbtm_ray.ray_session import ray_session  # Ray takes seconds to import

    table = Table("expert", "wall, s", "a step, ms", "the rest, s", title=f"{args.sizes[0]}, {args.ray_steps} steps")
    steps: dict[str, list[float]] = {"alone": [], "Ray Train": []}
    rests: dict[str, list[float]] = {"alone": [], "Ray Train": []}
    with ray_session(local_cpus=max(args.threads, 2)):
        for name in ["alone", *["Ray Train", "alone"] * args.rounds]:
            with tempfile.TemporaryDirectory() as folder:
                config = make_run(Path(folder), args).config
                if name == "alone":
                    wall, curve = in_new_process(TRAINING_ENV, train_here, config, args.threads)
                else:
                    wall, curve = train_through_ray(config, args.threads)
            own = [args.batch * args.length / point["tokens_per_s"] for point in curve[1:]]
            rest = wall - args.ray_steps * statistics.mean(own)
            steps[name] += own
            rests[name].append(rest)
            table.add_row(name, f"{wall:.1f}", f"{1000 * statistics.median(own):.1f}", f"{rest:.1f}")
    console.print(table)
    alone_s, ray_s = (statistics.median(steps[name]) for name in ("alone", "Ray Train"))
    return {
        "ray_step_overhead": round(ray_s / alone_s - 1, 4),
        "ray_fixed_tax_s": round(statistics.mean(rests["Ray Train"]) - statistics.mean(rests["alone"]), 1),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", choices=list(SIZES), default=["1M", "10M"], help="parameters; the first for Ray"
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a loop in a round")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each loop has")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads, for all")
    parser.add_argument(
        "--ray-steps", type=int, default=400, help="steps of the expert through Ray Train; 0 leaves it out"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of all loops")
    parser.add_argument("--compile", action="store_true", help="torch.compile in all loops")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console(width=120)
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    console.print(
        f"B = {args.batch}, T = {args.length}, {args.threads} threads, {args.precision}{', compiled' * args.compile}, "
        f"seed {args.seed}; load before: {load}"
    )
    table = Table("size", "parameters", "loop", "tokens/s", "of all rounds", "ours / it", title=f"{args.steps} steps")
    found = {size: compare_loops(size, args, table) for size in args.sizes}
    console.print(table)
    ratios = {
        key: {size: round(of[name], 3) for size, of in found.items() if name in of}
        for key, name in (
            ("hf_trainer_ratio", "HF Trainer"),
            ("minimal_loop_ratio", "minimal"),
            ("environment_ratio", "ours, plain environment"),
        )
    }
    print(json.dumps({**ratios, **(compare_ray(args, console) if args.ray_steps else {})}))


if __name__ == "__main__":
    main()
