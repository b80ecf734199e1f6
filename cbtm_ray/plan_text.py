"""The command line and the words of a plan: `python -m jobs.plan_run --config FILE --gpu a100 --gpus 8`."""

from __future__ import annotations

import argparse
import math

from cbtm_ray.cli import refuse
from cbtm_ray.config import Config
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import load_config
from cbtm_ray.plan import PEAK_TFLOPS, SHARD_BYTES_PER_TOKEN, STATE_BYTES, Devices, Plan, make_plan, makespan


def main(description: str, arguments: list[str] | None = None) -> int:
    """Print the plan of a configuration; exit code 0, or 2 with one line for a user's mistake."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, such as configs/small.yaml")
    parser.add_argument("--gpu", default="a100", choices=[*PEAK_TFLOPS, "other"], help="other needs --tflops; CPUs too")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="devices in all (8)")
    parser.add_argument("--tflops", type=float, metavar="X", help="peak of one device, 1e12 FLOPs/s, over the table's")
    parser.add_argument("--utilisation", type=float, default=0.3, metavar="X", help="share of the peak reached (0.3)")
    parser.add_argument("--price-per-hour", type=float, default=0.0, metavar="X", help="of one device")
    parser.add_argument("--corpus-tokens", type=int, metavar="N", help="training tokens of the corpus, if known")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields to set over the file's")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if options.corpus_tokens is not None and options.corpus_tokens < 1:
            raise UserError(f"--corpus-tokens={options.corpus_tokens} must be at least 1. Leave it out if unknown.")
        plan = make_plan(config, _devices(options, config))
    except UserError as error:
        return refuse(str(error))
    for name, value, note in rows(config, plan, options.corpus_tokens):
        print(f"{name:<28}{value:>22}  {note}".rstrip())
    return 0


def _devices(options: argparse.Namespace, config: Config) -> Devices:
    if options.gpus < 1:
        raise UserError(f"--gpus={options.gpus} must be at least 1.")
    if not 0 < options.utilisation <= 1:
        raise UserError(f"--utilisation={options.utilisation} must be above 0 and at most 1, such as 0.3.")
    if not 0 <= options.price_per_hour < math.inf:
        raise UserError(f"--price-per-hour={options.price_per_hour} must be 0 or more.")
    if options.tflops is not None and not 0 < options.tflops < math.inf:
        raise UserError(f"--tflops={options.tflops} must be above 0.")
    peak = options.tflops or PEAK_TFLOPS.get(options.gpu, {}).get(config.train.precision)
    if peak is None:
        raise UserError(
            f"--gpu={options.gpu} needs --tflops, the peak of one device in 1e12 FLOPs a second with "
            f"train.precision={config.train.precision}."
        )
    if options.gpu != "other" and not config.train.gpus_per_expert:
        raise UserError(
            "train.gpus_per_expert=0 trains on CPUs. Plan for GPUs with train.gpus_per_expert=1, or give "
            "--gpu other --tflops X for a CPU core."
        )
    return Devices(
        name=options.gpu,
        count=options.gpus,
        peak_flops=peak * 1e12,
        utilisation=options.utilisation,
        price_per_hour=options.price_per_hour,
    )


def rows(config: Config, plan: Plan, corpus_tokens: int | None) -> list[tuple[str, str, str]]:
    """(what, figure, what it rests on) for every line of the print."""
    devices = plan.devices
    n_clusters, expert_tokens = config.cluster.n_clusters, plan.expert_steps * plan.per_step
    found = [
        ("devices", f"{devices.count} x {devices.name}", f"{devices.peak_flops / 1e12:g} TFLOPs/s at the peak in "
         f"{config.train.precision}, {devices.utilisation:.0%} of it assumed"),
        ("parameters", f"{plan.model.parameters:,}", "of the seed, each expert and the dense control"),
        ("training state", size(STATE_BYTES * plan.model.parameters), "on a device, activations not counted"),
        ("seed", f"{plan.seed_steps:,} steps", f"{plan.seed_steps * plan.per_step:,} tokens, {plan.seed_flops:.3g} FLOPs"),
        ("expert, each of K", f"{plan.expert_steps:,} steps", f"{expert_tokens:,} tokens, {plan.expert_flops:.3g} FLOPs"),
        ("dense control", f"{n_clusters * plan.expert_steps:,} steps",
         f"{n_clusters * expert_tokens:,} tokens, {plan.dense_flops:.3g} FLOPs: as all {n_clusters} experts together"),
        ("inference", f"{plan.infer_flops_per_token:.3g} FLOPs", "a token, times the experts that run"),
        ("seed", clock(plan.seed_s), "on one device"),
        ("experts and dense control", clock(plan.training_s), f"{plan.slots} trained at once"),
        ("  experts alone", clock(makespan(plan.expert_runs_s, plan.slots)), ""),
        ("  dense control alone", clock(plan.dense_s), "in one worker: it cannot use more devices yet"),
        ("device-hours", f"{plan.device_hours:,.2f}", "held by training; idle devices and other stages not counted"),
    ]  # fmt: skip
    if devices.price_per_hour:
        found.append(
            (
                "cost",
                f"{plan.device_hours * devices.price_per_hour:,.2f}",
                f"at {devices.price_per_hour:g} a device-hour",
            )
        )
    found += [
        ("storage, models", size(plan.model_bytes), f"{n_clusters + 2} of them, float32"),
        ("storage, checkpoints", size(plan.checkpoint_bytes), "at most, while training"),
    ]
    if corpus_tokens:
        epochs = n_clusters * expert_tokens / corpus_tokens
        found.append(("storage, token shards", size(SHARD_BYTES_PER_TOKEN * corpus_tokens), "by our own shards"))
        found.append(("epochs", f"{epochs:.2f}", "over the corpus; an expert's own cluster may be smaller or larger"))
    return [
        *found,
        ("network, clusterer", size(plan.clusterer_bytes),
         f"in {config.cluster.max_iter} iterations; {size(plan.embedding_bytes)} of embeddings stay where they are"),
        ("network, between experts", size(0), "nothing is shared"),
        ("dense on all devices", clock(plan.parallel_dense_s), "the same FLOPs, were it data-parallel"),
        ("  its gradients", size(plan.gradient_bytes), "sent by each device, ring all-reduce of float32"),
    ]  # fmt: skip


def size(n_bytes: float) -> str:
    """Bytes with a decimal unit."""
    power = min(int(math.log10(n_bytes) // 3), 5) if n_bytes >= 1 else 0
    return f"{n_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def clock(seconds: float) -> str:
    """Seconds, or hours from one hour on."""
    return f"{seconds:,.0f} s" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
