"""What a run found: the table in the terminal, metrics.jsonl, and the data of report.html."""

from __future__ import annotations

import json
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from cbtm_ray import files, progress
from cbtm_ray.branch import DENSE, expert_folder
from cbtm_ray.load_config import dump_config
from cbtm_ray.report import ReportData, render_report
from cbtm_ray.run import Run

SYSTEM_NAMES = {"seed": "seed, before branching", "dense": "dense control"}


def curves(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Training curves by model: seed, dense, expert NNNN."""
    folders = {"seed": "seed", "dense": DENSE}
    folders |= {f"expert {cluster:04d}": expert_folder(cluster) for cluster in range(run.config.cluster.n_clusters)}
    return {name: run.need(folder, "train_experts")["curve"] for name, folder in folders.items()}


def metrics_lines(run: Run) -> str:
    """Every point of every curve as a line of JSON, with the model's name."""
    return "".join(
        json.dumps({"model": name, **point}) + "\n" for name, points in curves(run).items() for point in points
    )


def write_report(run: Run, summaries: dict[str, str]) -> None:
    """Write report.html with a line on each stage, and metrics.jsonl beside it."""
    files.write_bytes(run.uri("report.html"), render_report(collect(run, summaries)).encode())
    files.write_bytes(run.uri("metrics.jsonl"), metrics_lines(run).encode())


def collect(run: Run, summaries: dict[str, str]) -> ReportData:
    """All that the report shows, out of the manifests and results of a finished run."""
    found = run.need("clusterer", "fit_clusters")
    shards = run.need("shards", "partition_corpus")
    evaluation = files.read_json(run.uri("evaluation", "results.json"))
    chosen = next(row for row in evaluation["rows"] if row.get("chosen"))
    counted = {row["cluster"]: row for row in shards["train"]["clusters"]}
    return ReportData(
        title=f"C-BTM run {run.dir.rstrip('/').rpartition('/')[2]}",
        config_yaml=dump_config(run.config),
        stages=[
            {"stage": stage, "seconds": run.need(stage, "run_all")["seconds"], "summary": summary}
            for stage, summary in summaries.items()
        ],
        clusters=[{**cluster, **counted[cluster["cluster"]]} for cluster in found["clusters"]],
        clustering={
            **{key: found[key] for key in ("nmi", "purity", "gap", "n_iter", "balanced")},
            "size_skew": shards["train"]["size_skew"],
        },
        curves=curves(run),
        results=evaluation["rows"],
        domain_rows=evaluation["domains"],
        routing={
            "temperature": chosen["settings"]["temperature"],
            "beta": chosen["settings"].get("beta"),
            "gamma": chosen["settings"].get("gamma"),
            "tuned_on_documents": evaluation["tuned_on_documents"],
            "reported_on_documents": evaluation["reported_on_documents"],
        },
        map2d=found["map2d"],
        sample_text=evaluation["sample"],
    )


def print_results(run: Run) -> None:
    """The perplexity table, one sentence that says who won, and what to do next."""
    evaluation = files.read_json(run.uri("evaluation", "results.json"))
    table = Table(title="Held-out perplexity, with 95 % intervals over documents", title_justify="left", box=SIMPLE)
    for name in ("system", "routing", "compute", "perplexity", "ratio to dense"):
        table.add_column(name, justify="left" if name in ("system", "routing") else "right")
    per_token = next(r for r in evaluation["rows"] if r["system"] == "dense")["infer_flops_per_token"]
    for row in evaluation["rows"]:
        name = SYSTEM_NAMES.get(row["system"]) or ensemble_name(row)
        table.add_row(
            name + (" *" if row.get("chosen") else ""),
            row["routing"] or "-",
            f"{row['infer_flops_per_token'] / per_token:.2f} x",
            f"{row['ppl']:.2f} [{row['ppl_low']:.2f}, {row['ppl_high']:.2f}]",
            f"{row['ratio_to_dense']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]",
        )
    progress.console.print(table)
    progress.console.print("compute: of inference, dense control = 1; posterior routing runs all experts for evidence")
    progress.console.print(f"* best on the tuning documents. {verdict(evaluation)}", soft_wrap=True)
    progress.console.print(f"Report: {run.uri('report.html')}", soft_wrap=True)
    progress.console.print(f"Next, serve it: serve run serve.app:build run_dir={run.dir}", soft_wrap=True)


def ensemble_name(row: dict[str, Any]) -> str:
    if row["top_k"] == row["n_clusters"]:
        return f"all {row['n_clusters']} experts"
    return f"top-{row['top_k']} of {row['n_clusters']} experts"


def verdict(evaluation: dict[str, Any]) -> str:
    """One sentence on the ensemble that did best on the tuning half, as the other half saw it."""
    chosen = next(row for row in evaluation["rows"] if row.get("chosen"))
    name = f"{ensemble_name(chosen)}, {chosen['routing']} routing"
    ratio = f"{chosen['ratio_to_dense']:.3f} [{chosen['ratio_low']:.3f}, {chosen['ratio_high']:.3f}]"
    if chosen["ratio_high"] < 1:
        return f"The sparse ensemble ({name}) beats the dense control of the same training tokens: {ratio} of its perplexity."
    if chosen["ratio_low"] > 1:
        return f"The dense control beats the sparse ensemble ({name}): the ensemble has {ratio} of its perplexity."
    return f"No clear winner: the sparse ensemble ({name}) has {ratio} of the dense control's perplexity."
