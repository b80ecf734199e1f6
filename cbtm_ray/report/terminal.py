"""The results of a run: the table in the terminal, metrics.jsonl, and the data of report.html."""

from __future__ import annotations

import json
import os
import sys

from rich.box import SIMPLE
from rich.table import Table

from cbtm_ray import files, progress
from cbtm_ray.branch.branches import control_branches
from cbtm_ray.config import PARTITION_CONTROLS
from cbtm_ray.evaluate.prefix_curve import gain_sentence
from cbtm_ray.evaluate.result_rows import (
    ORACLE,
    ORACLE_MEANING,
    Evaluation,
    FewshotRow,
    ResultRow,
    Summary,
    system_name,
)
from cbtm_ray.load_config import dump_config
from cbtm_ray.manifests import ClustererManifest, CurvePoint, ShardsManifest
from cbtm_ray.report.page import ReportData, fewshot_by_system, fewshot_columns, render_report, verdict
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER, MOE_FOLDER, expert_folder

PERPLEXITY = "Held-out perplexity, with 95 % intervals over documents"


def curves(run: Run) -> dict[str, list[CurvePoint]]:
    """Training curves by model: seed, dense, moe where there is one, expert NNNN."""
    folders = {"seed": "seed", "dense": DENSE_FOLDER}
    if "moe" in run.config.train.controls:
        folders["moe"] = MOE_FOLDER
    folders |= {f"expert {cluster:04d}": expert_folder(cluster) for cluster in range(run.config.cluster.n_clusters)}
    return {name: run.require(folder, "train_experts")["curve"] for name, folder in folders.items()}


def control_curves(run: Run) -> dict[str, list[CurvePoint]]:
    """Training curves of the controls' experts: random NNNN and so on."""
    return {
        f"{control} {branch.cluster:04d}": run.require(branch.spec.name, "train_experts")["curve"]
        for control in run.config.train.controls
        if control in PARTITION_CONTROLS
        for branch in control_branches(run, control)
    }


def metrics_lines(run: Run) -> str:
    """Every point of every curve as a line of JSON, with the model's name."""
    found = curves(run) | control_curves(run)
    return "".join(json.dumps({"model": name, **point}) + "\n" for name, points in found.items() for point in points)


def write_report(run: Run, summaries: dict[str, str]) -> None:
    """Write report.html with a line on each stage, and metrics.jsonl beside it."""
    files.write_bytes(run.uri("report.html"), render_report(collect(run, summaries)).encode())
    files.write_bytes(run.uri("metrics.jsonl"), metrics_lines(run).encode())


def collect(run: Run, summaries: dict[str, str]) -> ReportData:
    """All that the report shows, out of the manifests and results of a finished run."""
    found: ClustererManifest = run.require("clusterer", "fit_clusters")
    shards: ShardsManifest = run.require("shards", "partition_corpus")
    evaluation: Evaluation = files.read_json(run.uri("evaluation", "results.json"))
    chosen = next(row for row in evaluation["rows"] if row.get("chosen"))
    counted = {row["cluster"]: row for row in shards["train"]["clusters"]}
    return ReportData(
        title=f"C-BTM run {run.dir.rstrip('/').rpartition('/')[2]}",
        config_yaml=dump_config(run.config),
        stages=[
            {"stage": stage, "seconds": run.require(stage, "run_all")["seconds"], "summary": summary}
            for stage, summary in summaries.items()
        ],
        clusters=[{**cluster, **counted[cluster["cluster"]]} for cluster in found["clusters"]],
        clustering={
            **{key: found[key] for key in ("nmi", "purity", "gap", "n_iter", "balanced")},
            "refined": found.get("refined", []),
            "size_skew": shards["train"]["size_skew"],
        },
        curves=curves(run),
        results=evaluation["rows"] + _merged_row(run),
        adapters=run.manifest("export/adapters"),
        domain_rows=evaluation["domains"],
        routing={
            **{key: chosen["settings"].get(key) for key in ("temperature", "beta", "gamma")},
            "tuned_on_documents": evaluation["tuned_on_documents"],
            "reported_on_documents": evaluation["reported_on_documents"],
        },
        map2d=found["map2d"],
        sample_text=evaluation["sample"],
        fewshot=evaluation["fewshot"],
        prefixes=evaluation.get("prefixes", []),
    )


def _merged_row(run: Run) -> list[ResultRow]:
    """The row of the merged mixture of experts, if there is one."""
    made = run.manifest("export/moe")
    return [] if made is None else made["rows"][-1:]


def print_results(run: Run) -> None:
    """The perplexity table, one sentence that says who won, and what to do next."""
    evaluation: Evaluation = files.read_json(run.uri("evaluation", "results.json"))
    dense = next(row for row in evaluation["rows"] if row["system"] == "dense")
    best = next(row for row in evaluation["rows"] if row.get("chosen"))
    progress.console.print(_results_table(evaluation["rows"]))
    progress.console.print("compute: of inference, dense control = 1; experts that are run only for routing count too")
    if any(row["routing"] == ORACLE for row in evaluation["rows"]):
        progress.console.print(f"oracle: {ORACLE_MEANING}", soft_wrap=True)
    if gain := gain_sentence(evaluation.get("prefixes", [])):
        progress.console.print(gain, soft_wrap=True)
    progress.console.print(f"* best on the tuning documents. {verdict(dense, best).striptags()}", soft_wrap=True)
    if any(row.get("served") for row in evaluation["rows"]):
        progress.console.print("+ served, and mixed by jobs.generate, where you ask for nothing else", soft_wrap=True)
    if evaluation["fewshot"]:
        progress.console.print(_fewshot_table(evaluation["fewshot"]))
    progress.console.print(f"Report: {run.uri('report.html')}", soft_wrap=True)
    if not run.config.run.shared:  # a sweep's point lacks the stages that its folders share
        progress.console.print(f"Next, serve it: {serve_command(run.dir)}", soft_wrap=True)


def _results_table(rows: list[ResultRow]) -> Table:
    table = _table(PERPLEXITY, ("system", "routing"), ("compute", "perplexity", "ratio to dense"))
    dense = next(row for row in rows if row["system"] == "dense")
    for row in rows:
        compute = f"{row['infer_flops_per_token'] / dense['infer_flops_per_token']:.2f} x"
        name = system_name(row) + (" *" if row.get("chosen") else "") + (" +" if row.get("served") else "")
        table.add_row(name, row["routing"] or "-", compute, *_measures(row))
    return table


def serve_command(run_dir: str) -> str:
    """The command that serves a run, with the `serve` of this Python's environment, which need not be on the PATH."""
    program = os.path.relpath(os.path.join(os.path.dirname(sys.executable), "serve"))
    return f"{program} run serve.app:build run_dir={run_dir}"


def _fewshot_table(rows: list[FewshotRow]) -> Table:
    """Accuracy in %, a column a task and scoring; of the mixtures with held weights, the others are in the report."""
    by_system = fewshot_by_system([row for row in rows if row["weights"] != "running"])
    table = _table(
        f"Few-shot accuracy in %, mean and deviation of {len(rows[0]['accuracies'])} draws",
        ("system", "routing"),
        tuple(fewshot_columns(rows)),
    )
    for found in by_system.values():
        cells = [f"{100 * row['accuracy']:.1f} +- {100 * row['accuracy_std']:.1f}" for row in found]
        table.add_row(system_name(found[0]), found[0]["routing"] or "-", *cells)
    return table


def print_average(run: Run) -> None:
    """The averages' perplexity beside the dense control's, a model of the same size and cost."""
    table = _table(PERPLEXITY, ("model", "weights of the experts"), ("perplexity", "ratio to dense"))
    for row in run.require("average", "average_experts")["rows"]:
        weights = f"{min(row['weights']):.3f} to {max(row['weights']):.3f}" if row["weights"] else "-"
        table.add_row(row["folder"], weights, *_measures(row))
    progress.console.print(table)
    progress.console.print(f"Hugging Face folders: {run.uri('average')}", soft_wrap=True)


def print_moe(run: Run) -> None:
    """The merged model's perplexity beside the dense control's and the ensemble's."""
    manifest = run.require("export/moe", "export_moe")
    progress.console.print(_results_table(manifest["rows"]))
    if not manifest["exact"]:
        progress.console.print(
            f"Experts differ in {manifest['averaged']} weights outside their feed-forward layers, which were averaged. Train "
            "with train.trainable=ffn, and merging is exact.",
            soft_wrap=True,
        )
    progress.console.print(f"Hugging Face folder: {run.uri('export/moe/model')}", soft_wrap=True)


def print_adapters(run: Run) -> None:
    """The served mixture's perplexity with experts of every rank."""
    made = run.require("export/adapters", "extract_adapters")
    title = f"{PERPLEXITY}: top-{made['top_k']}, {made['routing']} routing"
    table = _table(title, ("rank of the experts",), ("perplexity", "ratio to dense", "of the gain"))
    for row in made["rows"]:
        name = {None: "experts as trained", 0: "dense control"}.get(row["rank"], str(row["rank"]))
        kept = "-" if row.get("gain_kept") is None else f"{100 * row['gain_kept']:.0f} %"
        table.add_row(name, *_measures(row), kept)
    progress.console.print(table)
    left = "norms, and an output projection of its own"
    if not made["embeddings"]:
        left = f"embeddings (export.embeddings=true adds them), {left}"
    progress.console.print(
        f"{100 * made['dropped_share']:.0f} % of the experts' squared change is in weights that these adapters do not hold: "
        f"{left}. Folders in PEFT's format: {run.uri('export/adapters')}",
        soft_wrap=True,
    )


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in (*left, *right):
        table.add_column(name, justify="left" if name in left else "right")
    return table


def _measures(row: Summary) -> tuple[str, str]:
    """Perplexity and ratio to the dense control, with their intervals."""
    return (
        f"{row['ppl']:.2f} [{row['ppl_low']:.2f}, {row['ppl_high']:.2f}]",
        f"{row['ratio_to_dense']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]",
    )
