"""Job `sweep_clusters`: the whole method at every number of clusters and every budget, from one configuration.

    <run.dir>/
      shared/          corpus/  tokenizer/  seed/
      clusters=0004/   clusterer/  shards/
        tokens=800000/ experts/  controls/  evaluation/  report.html: a run directory that takes the rest from the two above
      sweep.json  sweep.html

Points follow each other; within one, Ray runs what fits. Every point is a run of its own: a sweep that was killed goes on, and
may be given more points later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import yaml
from matplotlib.axes import Axes
from rich.box import SIMPLE
from rich.table import Table

from cbtm_ray import files, pipeline, progress
from cbtm_ray.config import Config
from cbtm_ray.errors import UserError
from cbtm_ray.evaluate.result_rows import ORACLE, Evaluation, ResultRow, row_name
from cbtm_ray.load_config import build_config, config_tree
from cbtm_ray.ray_session import check_installed
from cbtm_ray.report import plots
from cbtm_ray.report.page import page_template
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER

Row = dict[str, Any]


def sweep_clusters(sweep: Run) -> None:
    """Do what is missing of a sweep, then write and print its table.

    Raises:
        UserError: a point is not valid, or was made with another configuration, before any is begun; or a run to compare
            with is of another corpus.
    """
    config = sweep.config
    clusters = sorted(set(config.sweep.clusters)) or [config.cluster.n_clusters]
    budgets = sorted(set(config.sweep.total_tokens)) or [config.train.total_tokens]
    points = {(k, tokens): point_config(config, k, tokens) for k in clusters for tokens in budgets}
    first = points[clusters[0], budgets[0]]
    compared = [_dense_row(config, uri) for uri in config.sweep.dense_runs]
    shared, folders = sweep.uri("shared"), {k: sweep.uri(f"clusters={k:04d}") for k in clusters}
    for (k, tokens), point in points.items():
        _point_run(point, folders[k], shared, tokens).check()
    check_installed("train.trackers", config.train.trackers)
    _run_jobs(_run(first, shared), "build_corpus")
    for k, folder in folders.items():
        _run_jobs(_run(points[k, budgets[0]], folder, shared), "fit_clusters", "partition_corpus")
    _run_jobs(_run(first, shared, folders[clusters[0]]), "train_seed")
    found = []
    for (k, tokens), point in points.items():
        progress.note(f"{k} clusters, {tokens:,} tokens")
        run = _point_run(point, folders[k], shared, tokens)
        _run_jobs(run, *pipeline.JOBS)
        evaluation: Evaluation = files.read_json(run.uri("evaluation", "results.json"))
        found.append({"n_clusters": k, "total_tokens": tokens, "run": run.dir, "rows": evaluation["rows"]})
    result = {"points": found, "dense_runs": compared}
    files.write_json(sweep.uri("sweep.json"), result)
    files.write_bytes(sweep.uri("sweep.html"), render_sweep(result).encode())
    progress.console.print(sweep_table(result))
    progress.console.print(f"Report: {sweep.uri('sweep.html')}", soft_wrap=True)


def point_config(config: Config, n_clusters: int, total_tokens: int) -> Config:
    """The configuration of one point. UserError if the sweep's does not allow it."""
    tree = config_tree(config)
    tree["cluster"]["n_clusters"], tree["train"]["total_tokens"] = n_clusters, total_tokens
    return build_config(tree)


def _run(config: Config, folder: str, *shared: str) -> Run:
    return Run(replace(config, run=replace(config.run, dir=folder, shared=shared)))


def _point_run(point: Config, folder: str, shared: str, tokens: int) -> Run:
    """Made anew for every use: which folder has a stage is looked up when it is made."""
    return _run(point, files.join(folder, f"tokens={tokens}"), folder, shared)


def _run_jobs(run: Run, *jobs: str) -> None:
    run.open()
    for job in jobs:
        pipeline.run_job(run, job)


def _dense_row(config: Config, uri: str) -> Row:
    """The dense control of a finished run. UserError unless it was measured on the sweep's held-out tokens."""
    folder = files.absolute(uri)
    if not files.exists(files.join(folder, "evaluation", "manifest.json")):
        raise UserError(
            f"sweep.dense_runs={uri!r} is not a finished run. Run first: python -m jobs.run_all --config FILE"
        )
    other = Run(build_config(yaml.safe_load(files.read_bytes(files.join(folder, "config.yaml")))))
    theirs, ours = _held_out_settings(other), _held_out_settings(Run(config))
    if differing := [
        f"{name}={theirs[name]!r} (the sweep has {ours[name]!r})" for name in ours if theirs[name] != ours[name]
    ]:
        raise UserError(
            f"sweep.dense_runs={uri!r} has {', '.join(differing)}: perplexities of other tokens do not compare. Leave it out."
        )
    rows = files.read_json(files.join(folder, "evaluation", "results.json"))["rows"]
    manifest = files.read_json(files.join(folder, DENSE_FOLDER, "manifest.json"))
    return {**next(row for row in rows if row["system"] == "dense"), "run": uri, "parameters": manifest["parameters"]}


def _held_out_settings(run: Run) -> Row:
    """The settings that decide which tokens are measured."""
    most = {"evaluate.max_documents": run.config.evaluate.max_documents}
    return {**run.settings("corpus"), **run.settings("tokenizer"), **most}


def best_by_top_k(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """The ensemble's row of each top-k whose routing did best on the tuning documents, by rising top-k."""
    worst_first = sorted(
        (r for r in rows if r["system"] == "cbtm" and r["routing"] != ORACLE), key=lambda row: -row["tuning_loss_nats"]
    )
    best = {row["top_k"]: row for row in worst_first}
    return [best[top_k] for top_k in sorted(best)]


def sweep_rows(result: Row) -> list[Row]:
    """A row a system to compare: of every point the dense control and the best ensemble of each top-k; the larger models."""
    found = []
    for point in result["points"]:
        about = {"n_clusters": point["n_clusters"], "total_tokens": point["total_tokens"]}
        dense = next(row for row in point["rows"] if row["system"] == "dense")
        found += [{**row, **about} for row in (dense, *best_by_top_k(point["rows"]))]
    return found + [{**row, "total_tokens": row["train_tokens"]} for row in result["dense_runs"]]


def sweep_name(row: Row) -> str:
    """The name of a row of the sweep."""
    return f"dense, {row['parameters']:,} parameters" if "run" in row else row_name(cast(ResultRow, row))


def mixed_name(top_k: int, n_clusters: int) -> str:
    """A top-k over all numbers of clusters."""
    return "all" if top_k == n_clusters else f"top-{top_k}"


def sweep_table(result: Row) -> Table:
    table = Table(title="Held-out perplexity by clusters, tokens and top-k", title_justify="left", box=SIMPLE)
    for name in ("clusters", "tokens", "system", "perplexity", "training FLOPs", "inference FLOPs/token"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for row in sweep_rows(result):
        clusters = "-" if "run" in row else str(row["n_clusters"])
        cost = f"{row['train_flops']:.3g}", f"{row['infer_flops_per_token']:.3g}"
        ppl = f"{row['ppl']:.2f} [{row['ppl_low']:.2f}, {row['ppl_high']:.2f}]"
        table.add_row(clusters, f"{row['total_tokens']:,}", sweep_name(row), ppl, *cost)
    return table


def render_sweep(result: Row) -> str:
    """sweep.html: a figure for every budget, and the table with costs."""
    budgets = sorted({point["total_tokens"] for point in result["points"]})
    figures = {}
    for tokens in budgets:
        points = [point for point in result["points"] if point["total_tokens"] == tokens]
        figures[tokens] = plots.plot(
            f"sweep-{tokens}", f"Perplexity against clusters, {tokens:,} tokens", _drawing(points)
        )
    rows = [{**row, "name": sweep_name(row)} for row in sweep_rows(result)]
    base = max(result["dense_runs"], key=lambda row: row["parameters"], default=rows[0])
    return page_template("sweep.html.j2").render(figures=figures, rows=rows, base=base, palette=plots.PALETTE)


def _drawing(points: list[Row]) -> Any:
    def draw(axes: Axes) -> None:
        series: dict[str, list[tuple[int, float]]] = {}
        for point in points:
            k = point["n_clusters"]
            series.setdefault("dense", []).append((k, next(r["ppl"] for r in point["rows"] if r["system"] == "dense")))
            for row in best_by_top_k(point["rows"]):
                series.setdefault(mixed_name(row["top_k"], k), []).append((k, row["ppl"]))
        plots.draw_sweep(axes, series)

    return draw
