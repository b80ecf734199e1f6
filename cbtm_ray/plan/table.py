"""The command line and the words of a plan: `python -m jobs.plan_run --config FILE --gpu a100 --gpus 8`."""

from __future__ import annotations

import argparse
import math

from cbtm_ray.config import PARTITION_CONTROLS, Config
from cbtm_ray.errors import UserError, refuse
from cbtm_ray.inputs import check_inputs
from cbtm_ray.load_config import load_config
from cbtm_ray.plan.estimate import PEAK_TFLOPS, SHARD_BYTES_PER_TOKEN, Devices, Plan, Training, make_plan
from cbtm_ray.run import Run

Row = tuple[str, str, str]


def main(description: str, arguments: list[str] | None = None) -> int:
    """Print the plan of a configuration; exit code 0, or 2 with one line for a user's mistake."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, such as configs/small.yaml")
    parser.add_argument("--gpu", default="a100", choices=[*PEAK_TFLOPS, "other"], help="other needs --tflops; CPUs too")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="devices in all (8)")
    parser.add_argument("--tflops", type=float, metavar="X", help="peak of one device, 1e12 FLOPs/s, over the table's")
    parser.add_argument("--utilization", type=float, default=0.3, metavar="X", help="share of the peak reached (0.3)")
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
    for name, value, note in rows(plan, options.corpus_tokens):
        print(f"{name:<28}{value:>22}  {note}".rstrip())
    return _check(config)


def _check(config: Config) -> int:
    """Check all that a job checks before it starts, too, when the plan is printed."""
    try:
        run = Run(config)
        run.check()
        check_inputs(run, local_files_only=True)
    except UserError as error:
        return refuse(str(error))
    return 0


def _devices(options: argparse.Namespace, config: Config) -> Devices:
    if options.gpus < 1:
        raise UserError(f"--gpus={options.gpus} must be at least 1.")
    if not 0 < options.utilization <= 1:
        raise UserError(f"--utilization={options.utilization} must be above 0 and at most 1, such as 0.3.")
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
        utilization=options.utilization,
        price_per_hour=options.price_per_hour,
    )


def rows(plan: Plan, corpus_tokens: int | None) -> list[Row]:
    """(what, figure, what it rests on) for every line of the print."""
    return [*_training_rows(plan), *_time_rows(plan), *_storage_rows(plan, corpus_tokens), *_network_rows(plan)]


def _training_rows(plan: Plan) -> list[Row]:
    devices, train, n_clusters = plan.devices, plan.config.train, plan.config.cluster.n_clusters
    found = [
        ("devices", f"{devices.count} x {devices.name}", f"{devices.peak_flops / 1e12:g} TFLOPs/s at the peak in "
         f"{train.precision}, {devices.utilization:.0%} of it assumed"),
        ("parameters", f"{plan.seed.parameters:,}", "of the seed, each expert and the dense control"),
        ("training state", size(plan.state_bytes(plan.seed)),
         f"{'on a GPU' if train.gpus_per_expert else 'in a worker'}, activations not counted"),
        _work("seed", plan.seed),
        _work("expert, each of K", plan.expert),
        _work("dense control", plan.dense, f": as all {n_clusters} experts together"),
    ]  # fmt: skip
    if train.budget == "by_size":
        largest = plan.skewed_runs[0][0].steps
        found.append(("  by size", f"1 to {largest:,} steps", "each expert, by its cluster's tokens: not known yet"))
    if train.clusters is not None:
        found.append(("  train.clusters", f"{len(plan.trainings) - 1} experts", "now; all else later, and not below"))
    if train.trainable == "ffn":
        found.append(("  train.trainable", "ffn", "experts take less than is said here, where all weights are trained"))
    for control in (control for control in train.controls if control in PARTITION_CONTROLS):
        domains = "; as many domains as clusters assumed" if control == "metadata" else ""
        found.append((f"control {control}", f"{n_clusters} experts", f"of the same steps{domains}"))
    if plan.moe:
        sizes = f"; {plan.moe.parameters:,} parameters, {size(plan.state_bytes(plan.moe))} of training state"
        found.append(_work("control moe", plan.moe, sizes))
    return [*found, ("inference", f"{plan.seed.infer_flops:.3g} FLOPs", "a token, times the experts that run")]


def _work(name: str, training: Training, more: str = "") -> Row:
    return name, f"{training.steps:,} steps", f"{training.tokens:,} tokens, {training.flops:.3g} FLOPs{more}"


def _time_rows(plan: Plan) -> list[Row]:
    train, price = plan.config.train, plan.devices.price_per_hour
    place = f"on {plan.compute_devices:g} device{'s' if plan.compute_devices > 1 else ''}"
    more_cpus = "" if train.gpus_per_expert else "; seed_model.cpus may give it more"
    found = [("seed", clock(plan.seed_s), place + more_cpus)]
    if train.clusters is None:
        found += [
            ("experts and dense control", clock(plan.runs_s(plan.first_runs)), f"{plan.slots} trained at once"),
            ("  dense control alone", clock(plan.run_s([plan.dense])),
             f"{place}, by train.workers_per_expert={train.workers_per_expert}"),
        ]  # fmt: skip
    found.append(("  experts alone", clock(plan.runs_s(plan.expert_runs)), f"{plan.slots} trained at once"))
    if train.budget == "by_size":
        found.append(
            ("  experts by size, at most", clock(plan.runs_s(plan.skewed_runs)), "one cluster of nearly all tokens")
        )
    if plan.control_runs:
        shares = ", if their shares are equal" if train.budget == "by_size" else ""
        found.append(("controls", clock(plan.runs_s(plan.control_runs)), f"after them, {plan.slots} at once{shares}"))
    hours = plan.device_hours
    found.append(("device-hours", f"{hours:,.2f}", "held by training; idle devices and other stages not counted"))
    return found + [("cost", f"{hours * price:,.2f}", f"at {price:g} a device-hour")] * bool(price)


def _storage_rows(plan: Plan, corpus_tokens: int | None) -> list[Row]:
    found = [
        ("storage, models", size(plan.model_bytes), f"{len(plan.trainings)} of them, float32"),
        ("storage, checkpoints", size(plan.checkpoint_bytes),
         f"at most at a time; {size(plan.written_bytes)} written in all"),
    ]  # fmt: skip
    if corpus_tokens:
        found += [
            ("storage, token shards", size(SHARD_BYTES_PER_TOKEN * corpus_tokens), "by our own shards"),
            ("epochs", f"{plan.dense.tokens / corpus_tokens:.2f}",
             "over the corpus; an expert's own cluster may be smaller or larger"),
        ]  # fmt: skip
    if plan.config.train.clusters is None:
        asked, flops = plan.config.evaluate, sum(training.infer_flops for training in plan.trainings)
        prompts = len(asked.fewshot) * len(asked.fewshot_seeds) * (asked.fewshot_examples + 1)
        fewshot = f" and {prompts:,} few-shot sequences a label" if prompts else ""
        found.append(
            ("evaluation", f"{flops:.3g} FLOPs", f"a token, by {len(plan.trainings)} models once each; at most "
             f"{asked.max_documents:,} documents{fewshot}")
        )  # fmt: skip
    return found


def _network_rows(plan: Plan) -> list[Row]:
    config, train = plan.config, plan.config.train
    again = ", and again for the control unbalanced" if "unbalanced" in train.controls else ""
    found = [
        ("network, clusterer", size(plan.clusterer_bytes),
         f"in {config.cluster.max_iter} iterations{again}; {size(plan.embedding_bytes)} of embeddings stay where they are"),
        ("network, between experts", size(0), "nothing is shared"),
        ("dense on all devices", clock(plan.parallel_dense_s), "the same FLOPs, were it data-parallel"),
        ("  its gradients", size(plan.gradient_bytes), "sent by each device, ring all-reduce of float32"),
    ]  # fmt: skip
    if train.workers_per_expert > 1:
        dense = size(plan.worker_bytes(plan.dense))
        sent = (
            f"sent by each of its {train.workers_per_expert} workers, {train.parallel}; {dense} for the dense control"
        )
        found.insert(1, ("network, within an expert", size(plan.worker_bytes(plan.expert)), sent))
    return found


def size(n_bytes: float) -> str:
    """Bytes with a decimal unit."""
    power = min(int(math.log10(n_bytes) // 3), 5) if n_bytes >= 1 else 0
    return f"{n_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def clock(seconds: float) -> str:
    """Seconds, or hours from one hour on."""
    return f"{seconds:,.0f} s" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
