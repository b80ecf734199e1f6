"""The sweep over clusters and budgets: its table by hand, what its points share, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cbtm_ray import files
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import build_config
from cbtm_ray.run import Run
from cbtm_ray.sweep import _dense_row, best_by_top_k, point_config, render_sweep, sweep_clusters, sweep_rows
from tests.support.report_data import Page, result
from tests.support.tiny import tiny_tree, write_corpus


def point(n_clusters: int, tokens: int, ppl: float) -> dict[str, Any]:
    """A dense control of `ppl`; top-1 is best by posterior routing (0.9 of it), all experts by embedding (0.8)."""
    mixtures = [("embedding", 1, 1.0, 3.1), ("posterior", 1, 0.9, 3.0), ("embedding", n_clusters, 0.8, 2.8),
                ("posterior", n_clusters, 0.7, 2.9)]  # fmt: skip
    rows = [
        {**result("cbtm", ppl * ratio, ratio, k, routing), "n_clusters": n_clusters, "tuning_loss_nats": loss}
        for routing, k, ratio, loss in mixtures
    ]
    return {"n_clusters": n_clusters, "total_tokens": tokens, "run": "r", "rows": [result("dense", ppl, 1.0, 1), *rows]}


def sweep(**more: Any) -> dict[str, Any]:
    points = [point(2, 1000, 50.0), point(2, 4000, 40.0), point(4, 1000, 48.0), point(4, 4000, 36.0)]
    return {"points": points, "dense_runs": [], **more}


def test_the_routing_of_a_top_k_is_chosen_on_the_tuning_documents() -> None:
    found = [(row["top_k"], row["routing"], row["ppl"]) for row in best_by_top_k(point(4, 1000, 50.0)["rows"])]
    assert found == [(1, "posterior", 45.0), (4, "embedding", 40.0)]


def test_a_row_for_the_dense_control_and_every_top_k_of_a_point() -> None:
    large = {**result("dense", 30.0, 1.0, 1), "run": "runs/large", "parameters": 7_000_000, "train_tokens": 4000}
    rows = sweep_rows(sweep(dense_runs=[large]))
    assert [(row["n_clusters"], row["total_tokens"], row["ppl"]) for row in rows[:3]] == [
        (2, 1000, 50.0), (2, 1000, 45.0), (2, 1000, 40.0),
    ]  # fmt: skip
    assert len(rows) == 4 * 3 + 1
    assert rows[-1]["total_tokens"] == 4000


@pytest.mark.parametrize("given", [False, True])
def test_the_page_has_every_point_and_its_cost_against_the_larger_model(given: bool) -> None:
    large = {**result("dense", 30.0, 1.0, 1), "run": "runs/large", "parameters": 7_000_000}
    large |= {"infer_flops_per_token": 4_600_000, "train_flops": 2.763e14}
    html = render_sweep(sweep(dense_runs=[large] if given else []))
    page = Page(html)
    row = next(row for row in page.rows if row[:2] == ["all 4 experts, embedding", "4"])
    assert row[2:4] == ["1.00 k", "38.4 [37.2, 39.6]"]
    assert row[4:] == (
        ["1.28", "27.6 T", "0.100", "1.84 M", "0.400"] if given else ["0.768", "27.6 T", "1.00", "1.84 M", "4.00"]
    )
    assert given == any(row[0] == "dense, 7,000,000 parameters" for row in page.rows)
    assert [text for tag, _ in page.tags if (text := tag) == "svg"] == ["svg", "svg"]
    assert "script" not in html


def config(tmp_path: Path, **more: Any) -> Any:
    tree = tiny_tree(tmp_path / "sweep", tmp_path / "corpus")
    return build_config({**tree, **more})


def test_a_point_that_cannot_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    swept = Run(config(tmp_path, sweep={"clusters": [2, 17], "total_tokens": [2048]}))
    with pytest.raises(UserError, match=r"total_tokens=2048 must give each of the 17 experts at least one step"):
        sweep_clusters(swept)
    assert not files.exists(swept.uri("shared"))
    assert point_config(swept.config, 4, 512).cluster.n_clusters == 4


def test_a_point_of_another_configuration_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    swept = Run(config(tmp_path, sweep={"clusters": [2, 4], "total_tokens": [2048]}))
    with_controls = point_config(
        config(tmp_path, train={**tiny_tree(tmp_path, tmp_path)["train"], "controls": ["random"]}), 4, 2048
    )
    folder = swept.uri("clusters=0004", "tokens=2048")
    Run(replace(with_controls, run=replace(with_controls.run, dir=folder))).claim("evaluation")
    with pytest.raises(UserError, match=r"tokens=2048 was made with another configuration: train\.controls=\[\]"):
        sweep_clusters(swept)
    assert not files.exists(swept.uri("shared"))


def finished(folder: Path, **more: Any) -> str:
    """A run directory with the evaluation of its dense control alone."""
    run = Run(build_config({**tiny_tree(folder, folder.parent / "corpus"), **more}))
    run.open()
    run.finish("controls/dense", {"parameters": 7_000_000})
    files.write_json(run.uri("evaluation", "results.json"), {"rows": [result("dense", 30.0, 1.0, 1)]})
    run.finish("evaluation", {})
    return run.dir


def test_a_larger_model_is_compared_only_on_the_same_held_out_tokens(tmp_path: Path) -> None:
    swept = config(tmp_path)
    same = finished(tmp_path / "same", seed_model={"hidden_size": 256, "train_tokens": 9})
    assert _dense_row(swept, same)["parameters"] == 7_000_000
    other = finished(tmp_path / "other", tokens={"vocab_size": 400, "sequence_length": 32})
    with pytest.raises(UserError, match=r"has tokens\.vocab_size=400 \(the sweep has 300\): perplexities of other"):
        _dense_row(swept, other)
    with pytest.raises(UserError, match="is not a finished run"):
        _dense_row(swept, str(tmp_path))


@pytest.mark.slow
@pytest.mark.ray
def test_points_share_what_they_can_and_a_second_call_only_adds(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "corpus")
    swept = Run(config(tmp_path, sweep={"clusters": [2, 4], "total_tokens": [2048]}))
    swept.open()
    sweep_clusters(swept)
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert "Next, serve it" not in printed  # a point cannot be served as it is
    found = sorted(str(path.parent.relative_to(swept.dir)) for path in Path(swept.dir).rglob("settings.json"))
    points = [
        f"clusters={k:04d}/tokens=2048/{stage}" for k in (2, 4) for stage in ("controls/dense", "evaluation", "experts")
    ]
    parts = [f"clusters={k:04d}/{stage}" for k in (2, 4) for stage in ("clusterer", "shards")]
    assert found == sorted([*points, *parts, "shared/corpus", "shared/seed", "shared/tokenizer"])
    result = json.loads(Path(swept.uri("sweep.json")).read_text())
    assert [(p["n_clusters"], p["total_tokens"]) for p in result["points"]] == [(2, 2048), (4, 2048)]
    for row in (row for p in result["points"] for row in p["rows"]):
        assert row["ppl"] == pytest.approx(math.exp(row["loss_nats"]))
    seeds = [next(row for row in p["rows"] if row["system"] == "seed")["ppl"] for p in result["points"]]
    assert seeds[0] == seeds[1]
    times = {path: path.stat().st_mtime_ns for path in Path(swept.dir).rglob("manifest.json")}
    large = swept.uri("clusters=0004", "tokens=2048")
    more = Run(config(tmp_path, sweep={"clusters": [2, 4], "total_tokens": [2048], "dense_runs": [large]}))
    sweep_clusters(more)
    assert {path: path.stat().st_mtime_ns for path in times} == times
