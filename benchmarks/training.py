"""The training loop beside its peers, and through Ray Train beside itself: python -m benchmarks.training [--steps 20]

    B sequences, T tokens, V vocabulary

Two tables. Loops: the same model, data, batch, optimiser and threads in our loop, in Hugging Face's Trainer and in a
minimal loop, alternating, so that a busy machine slows all three. Ray Train: one expert through cbtm_ray.branch, and the
same in this process. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
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
from cbtm_ray.load_config import build_config
from cbtm_ray.run import Run
from cbtm_ray.tokens import PackedSequences, save_tokenizer, train_tokenizer
from cbtm_ray.train import Trainer, TrainSpec, learning_rate, make_optimizer, train_model

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


def make_model(sizes: dict[str, Any], args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


def make_documents(n_tokens: int, vocab_size: int, seed: int) -> list[np.ndarray]:
    """Documents of about 200 tokens, as skewed as words are; token 0 is left for their ends."""
    rng = np.random.default_rng(seed)
    tokens = 1 + rng.zipf(1.2, size=n_tokens) % (vocab_size - 1)
    return np.array_split(tokens.astype(np.int32), max(n_tokens // 200, 1))


def make_spec(steps: int, args: argparse.Namespace) -> TrainSpec:
    return TrainSpec(
        name="benchmark", steps=steps, batch_size=args.batch, micro_batch_size=None, sequence_length=args.length,
        learning_rate=1e-3, final_lr_fraction=0.0, schedule="linear", warmup_steps=10, betas=(0.9, 0.95),
        weight_decay=0.0, clip_norm=1.0, precision="fp32", activation_checkpointing=False, compile=False,
    parallel="ddp",
        cross_documents=True, log_every=LOG_EVERY, checkpoint_every=200, notice_every=10, evaluate_every=None,
        evaluate_sequences=1,
    )  # fmt: skip


Loop = Callable[[PreTrainedModel, PackedSequences, TrainSpec], float]
"""Trains `spec.steps` steps, and says the seconds of all but the first."""


def our_loop(model: PreTrainedModel, sequences: PackedSequences, spec: TrainSpec) -> float:
    trainer = Trainer(model, sequences, spec)
    trainer.train_step()
    started = time.perf_counter()
    while trainer.step < spec.steps:
        trainer.train_step()
        if trainer.step % LOG_EVERY == 0:
            trainer.add_point(0.0)
    return time.perf_counter() - started


def minimal_loop(model: PreTrainedModel, sequences: PackedSequences, spec: TrainSpec) -> float:
    """What one would write first: all logits, their cross-entropy, clipping, a fused AdamW."""
    optimizer, started = make_optimizer(model.train(), spec), 0.0
    for step in range(spec.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step)
        batch = torch.from_numpy(sequences.batch(step * spec.batch_size, spec.batch_size))
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % LOG_EVERY == 0:
            loss.item()
        started = started or time.perf_counter()
    return time.perf_counter() - started


def hugging_face_loop(model: PreTrainedModel, sequences: PackedSequences, spec: TrainSpec) -> float:
    import transformers  # the Trainer takes seconds more, and accelerate is optional

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    rows = torch.from_numpy(sequences.batch(0, spec.steps * spec.batch_size))[:, :-1]
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            folder, max_steps=spec.steps, per_device_train_batch_size=spec.batch_size, optim="adamw_torch_fused",
            learning_rate=spec.learning_rate, lr_scheduler_type="linear", warmup_steps=spec.warmup_steps,
            adam_beta1=spec.betas[0], adam_beta2=spec.betas[1], weight_decay=0.0, max_grad_norm=spec.clip_norm,
            logging_steps=LOG_EVERY, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False, log_level="error",
        )  # fmt: skip
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        trainer = transformers.Trainer(model=model, args=options, train_dataset=data, callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return times[-1] - times[0]


LOOPS: dict[str, Loop] = {"ours": our_loop, "HF Trainer": hugging_face_loop, "minimal": minimal_loop}


def compare_loops(size: str, args: argparse.Namespace, table: Table) -> dict[str, float]:
    """Tokens a second of every loop: the best of `rounds`, in which they take turns. Peers that are missing are said."""
    spec = make_spec(args.steps + 1, args)
    n_tokens = 2 * spec.steps * spec.tokens_per_step
    documents = make_documents(n_tokens, SIZES[size]["vocab_size"], args.seed)
    speeds: dict[str, list[float]] = {name: [] for name in LOOPS}
    n_parameters = 0
    for _ in range(args.rounds):
        for name, loop in LOOPS.items():
            model = make_model(SIZES[size], args)
            n_parameters = model.num_parameters()
            sequences = PackedSequences(documents, sequence_length=args.length, end_of_text=0, seed=args.seed)
            try:
                seconds = loop(model, sequences, spec)
            except ImportError as error:
                table.add_row(size, f"{n_parameters:,}", name, f"not run: {str(error).splitlines()[0]}", "", "")
                continue
            speeds[name].append(args.steps * spec.tokens_per_step / seconds)
    for name, found in speeds.items():
        if found:
            spread = f"{min(found):,.0f} to {max(found):,.0f}"
            ratio = f"{max(speeds['ours']) / max(found):.2f}"
            table.add_row(size, f"{n_parameters:,}", name, f"{max(found):,.0f}", spread, ratio)
    return {name: max(found) for name, found in speeds.items() if found}


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


def train_here(run: Run, branch: Any) -> list[dict[str, Any]]:
    """All that a Ray Train worker does for the branch, in this process; its curve."""
    from cbtm_ray.branch_worker import read_sequences  # brings Ray, as the caller does
    from cbtm_ray.models import load_model, save_model
    from cbtm_ray.tokens import load_tokenizer

    tokenizer = load_tokenizer(run.uri("tokenizer"))
    model = load_model(branch.init)
    sequences, valid = read_sequences(run, branch, tokenizer.eos_token_id)
    curve = train_model(
        model, sequences, branch.spec, valid=valid, state=None, save=lambda state: None, log=lambda point: None
    )
    save_model(model, tokenizer, run.uri("here"))
    return curve


def training_seconds(curve: list[dict[str, Any]]) -> float:
    """Seconds between the first point of the curve and its last, checkpoints included."""
    steps = [
        (point["tokens"] - before["tokens"]) / point["tokens_per_s"] for before, point in itertools.pairwise(curve)
    ]
    return sum(steps)


def compare_ray(args: argparse.Namespace, console: Console) -> dict[str, float]:
    """One expert through Ray Train between two in this process, whose mean it is compared with."""
    from cbtm_ray.branch import expert_branches, train_branches  # Ray takes seconds to import
    from cbtm_ray.ray_session import ray_session

    table = Table("expert", "wall, s", "its steps, s", "the rest, s", title=f"{args.sizes[0]}, {args.ray_steps} steps")
    found: list[tuple[float, float]] = []

    def clock(name: str, work: Callable[[], list[dict[str, Any]]]) -> None:
        started = time.perf_counter()
        curve = work()
        wall, steps = time.perf_counter() - started, training_seconds(curve)
        found.append((wall, steps))
        table.add_row(name, f"{wall:.1f}", f"{steps:.2f}", f"{wall - steps:.1f}")

    with tempfile.TemporaryDirectory() as folder, ray_session(local_cpus=max(args.threads, 2)):
        run = make_run(Path(folder), args)
        branch = expert_branches(run)[1]

        def through_ray() -> list[dict[str, Any]]:
            train_branches(run, [branch], title="benchmark", cpus=args.threads, slots=1)
            return run.need(branch.spec.name, "train_experts")["curve"]

        clock("in this process", lambda: train_here(run, branch))
        clock("through Ray Train", through_ray)
        clock("in this process", lambda: train_here(run, branch))
    console.print(table)
    here_wall, here_steps = (sum(pair) / 2 for pair in zip(found[0], found[2], strict=True))
    ray_wall, ray_steps = found[1]
    return {
        "ray_step_overhead": round(ray_steps / here_steps - 1, 4),
        "ray_fixed_tax_s": round((ray_wall - ray_steps) - (here_wall - here_steps), 1),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", choices=list(SIZES), default=["1M", "10M"], help="parameters; the first for Ray"
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a loop in a round")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each loop has, the best of which counts")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads, for all")
    parser.add_argument(
        "--ray-steps", type=int, default=400, help="steps of the expert through Ray Train; 0 leaves it out"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console()
    torch.set_num_threads(args.threads)
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    console.print(f"B = {args.batch}, T = {args.length}, {args.threads} threads, seed {args.seed}; load before: {load}")
    table = Table("size", "parameters", "loop", "tokens/s", "of all rounds", "ours / it", title=f"{args.steps} steps")
    speeds = {size: compare_loops(size, args, table) for size in args.sizes}
    console.print(table)
    ratios = {
        key: {size: round(found["ours"] / found[name], 3) for size, found in speeds.items() if name in found}
        for key, name in (("hf_trainer_ratio", "HF Trainer"), ("minimal_loop_ratio", "minimal"))
    }
    print(json.dumps({**ratios, **(compare_ray(args, console) if args.ray_steps else {})}))


if __name__ == "__main__":
    main()
