"""The stages in their order: what each job runs, and the line it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from cbtm_ray import progress
from cbtm_ray.branch import launch
from cbtm_ray.cluster import controls, count_ngrams, fit, partition
from cbtm_ray.config import CONTROLS, PARTITION_CONTROLS, Control
from cbtm_ray.corpus import build
from cbtm_ray.corpus.sample import sample_texts
from cbtm_ray.corpus.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from cbtm_ray.evaluate import average, domain_task, results
from cbtm_ray.export import extract_adapters, moe
from cbtm_ray.model_checks import check_fewshot
from cbtm_ray.ray_session import check_installed
from cbtm_ray.report import terminal
from cbtm_ray.run import Run

Work = Callable[[Run], Mapping[str, Any]]
Summary = str | Callable[[dict[str, Any]], str]
"""A template of the manifest, or what makes the line of it."""
Stage = tuple[str, Work, Summary]


def make_tokenizer(run: Run) -> dict[str, Any]:
    """Stage `tokenizer/`: a Hugging Face folder, trained on the corpus sample or loaded."""
    wanted = run.config.tokens
    tokenizer: PreTrainedTokenizerBase
    if wanted.tokenizer == "train":
        tokenizer = train_tokenizer(sample_texts(run), wanted.vocab_size)
        check_fewshot(run, tokenizer)
    else:
        tokenizer = load_tokenizer(wanted.tokenizer)
    return {"vocabulary": len(tokenizer), "content": save_tokenizer(tokenizer, run.uri("tokenizer"))}


JOBS: dict[str, list[Stage]] = {
    "build_corpus": [
        ("corpus", build.build_corpus, build.summary),
        ("tokenizer", make_tokenizer, "{vocabulary:,} tokens"),
    ],
    "fit_clusters": [("clusterer", fit.fit_clusters, fit.summary)],
    "partition_corpus": [
        (
            "shards",
            partition.partition_corpus,
            "{train[tokens]:,} tokens; largest cluster {train[size_skew]:.2f} x mean",
        ),
        ("ngrams", count_ngrams.fit_ngrams, "{pairs:,} pairs of tokens, {mib:.1f} MiB, from {tokens:,} tokens"),
    ],
    "train_seed": [("seed", launch.train_seed, "{parameters:,} parameters, {train_tokens:,} tokens")],
    "train_experts": [
        ("experts", launch.train_experts, "{experts} experts and the dense control, {train_tokens:,} tokens each side")
    ],
    "evaluate_mixture": [
        ("evaluation", results.evaluate_mixture, "{reported_tokens:,} tokens of {reported_on_documents:,} documents")
    ],
}
"""Job -> stages (folder, work, summary of its manifest), in the order of `run_all`."""

ControlStage = tuple[str, Callable[..., Mapping[str, Any]], str, tuple[Control, ...]]
NGRAMS_LINE = "{pairs:,} pairs of tokens, {mib:.1f} MiB, from {tokens:,} tokens"

CONTROL_STAGES: dict[str, list[ControlStage]] = {
    "partition_corpus": [
        (
            "shards/controls/{}",
            controls.partition_control,
            "{n_clusters} clusters; largest {size_skew:.2f} x mean",
            PARTITION_CONTROLS,
        ),
        ("ngrams/controls/{}", count_ngrams.fit_control_ngrams, NGRAMS_LINE, PARTITION_CONTROLS),
    ],
    "train_experts": [("controls/{}", launch.train_control, "{experts} experts, {train_tokens:,} tokens", CONTROLS)],
}
"""Job -> what it does for each of `train.controls` that it has something to do for, after its stages."""

EXTRA_JOBS: dict[str, list[Stage]] = {
    "average_experts": [("average", average.average_experts, "uniform and by routing weights")],
    "export_moe": [("export/moe", moe.export_moe, "{parameters:,} parameters, routers from {ridge_tokens:,} tokens")],
    "extract_adapters": [
        (
            "export/adapters",
            extract_adapters.extract_adapters,
            "rank {rank}; least that keeps 95 % of the gain: {least_rank}",
        )
    ],
    "make_fewshot_task": [("fewshot", domain_task.make_task, "{examples} examples; for evaluate.fewshot: {task}")],
}
"""Jobs on a finished run, beyond `run_all`."""


def stages(run: Run, job: str) -> list[Stage]:
    """The stages of a job in this run."""
    return (JOBS | EXTRA_JOBS)[job] + [
        (folder.format(control), partial(work, control=control), template)
        for control in run.config.train.controls
        for folder, work, template, having in CONTROL_STAGES.get(job, [])
        if control in having
    ]


def run_job(run: Run, job: str) -> None:
    """Do what is missing of a job's stages, and say in a line how each came out."""
    for folder, work, template in stages(run, job):
        manifest, ran = run.stage(folder, partial(work, run))
        progress.summary(folder, manifest["seconds"] if ran else None, _line(template, manifest))
    if job == "evaluate_mixture":
        terminal.write_report(run, summaries(run))
        terminal.print_results(run)
    if job == "average_experts":
        terminal.print_average(run)
    if job == "extract_adapters":
        terminal.write_report(run, summaries(run))
        terminal.print_adapters(run)
    if job == "export_moe":
        terminal.write_report(run, summaries(run))
        terminal.print_moe(run)


def _line(summary: Summary, manifest: dict[str, Any]) -> str:
    return summary.format(**manifest) if isinstance(summary, str) else summary(manifest)


def summaries(run: Run) -> dict[str, str]:
    """The line of every finished stage, by its folder, in the stages' order."""
    return {
        folder: _line(template, manifest)
        for job in JOBS
        for folder, _, template in stages(run, job)
        if (manifest := run.manifest(folder))
    }


def run_all(run: Run) -> None:
    if run.manifest("experts") is None:
        check_installed("train.trackers", run.config.train.trackers)  # else it would be missed only after hours
    for job in JOBS:
        run_job(run, job)
