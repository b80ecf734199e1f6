"""The report page: every number is there, nothing is loaded, nothing breaks out of its escape."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import Any

import pytest

from cbtm_ray.errors import UserError
from cbtm_ray.report.page import ReportData, duration, exact, heat_map, render_report, scaled, sig, verdict
from tests.support.report_data import HOSTILE, Page, curve, make_data, result, results


def test_every_result_row_appears_with_its_numbers() -> None:
    data = make_data()
    page = Page(render_report(data))
    names = [
        "seed, before branching",
        "dense control",
        "top-1 of 4 experts, embedding",
        "all 4 experts, embedding",
        "top-2 of 4 experts, posterior",
        "all 4 experts, posterior",
    ]
    perplexity = [row for row in page.rows if row[0].removesuffix("best").removesuffix("served") in names][:6]
    tags = {"top-1 of 4 experts, embedding": "served", "top-2 of 4 experts, posterior": "best"}
    assert [row[0] for row in perplexity] == [name + tags.get(name, "") for name in names]
    assert page.row("top-2 of 4 experts, posteriorbest")[1:] == [
        "40.0 [38.8, 41.2]",
        "0.800 [0.784, 0.816]",
        "3.689",
        "1.757",
    ]
    assert page.row("top-2 of 4 experts, posterior")[1:] == ["20.0 M", "1.00", "27.6 T", "1.00", "920 k", "2.00"]
    numbers = [value for row in data.results for value in row.values() if isinstance(value, float)]
    assert set(numbers) <= set(page.values)


def test_controls_are_rows_with_their_meaning_and_never_the_headline() -> None:
    controls = [result("random", 30.0, 0.6, 4, "uniform"), result("metadata", 31.0, 0.62, 1, "bayes")]
    page = Page(render_report(make_data(results=[*results(), *controls])))
    assert page.row("random, all 4 experts, uniform")[1].startswith("30.0 [")
    assert page.row("metadata, top-1 of 4 experts, bayes")[1].startswith("31.0 [")
    assert "reaches perplexity 40.0" in page.text("headline")
    assert all(word in page.text("dt") for word in ("uniform", "bayes", "random", "metadata"))
    assert "unbalanced" not in page.text("dt")
    assert not {"uniform", "random"} & set(Page(render_report(make_data())).text("dt").split())


def test_domains_have_the_perplexity_of_every_system_and_the_weights_of_the_experts() -> None:
    page = Page(render_report(make_data()))
    seed_rows = [row for row in page.rows if row[0] == "seed, before branching"]
    assert ["62.0", "52.0"] in [row[1:] for row in seed_rows]
    assert [row for row in page.rows if row[0] == "law"][-1][1:] == ["70", "30", "0", "0"]
    assert [row for row in page.rows if row[0] == HOSTILE][-1][1:] == ["0", "25", "25", "50"]


def accuracies(task: str, value: float, weights: str | None = None, **system: Any) -> list[dict[str, Any]]:
    about = {
        "task": task,
        "system": "dense",
        "n_clusters": 1,
        "routing": None,
        "top_k": 1,
        "weights": weights,
        **system,
    }
    return [
        {
            **about,
            "scoring": scoring,
            "examples": 200,
            "accuracy": accuracy,
            "accuracy_std": accuracy / 10,
            "accuracies": [accuracy],
        }
        for scoring, accuracy in (("likelihood", value), ("calibrated", value + 0.05))
    ]


def test_few_shot_accuracies_are_a_row_a_system_and_columns_a_task() -> None:
    best = {"system": "cbtm", "n_clusters": 4, "routing": "posterior", "top_k": 2}
    systems = [(0.25, None, {"system": "majority"}), (0.5, None, {}), (0.625, "held", best), (0.75, "running", best)]
    tasks = ((HOSTILE, 0), ("mood", 0.1))
    rows = [row for task, more in tasks for v, w, s in systems for row in accuracies(task, v + more, w, **s)]
    page = Page(render_report(make_data(fewshot=rows)))
    columns = [f"{task}, {scoring}" for task in (HOSTILE, "mood", "Mean") for scoring in ("likelihood", "calibrated")]
    assert ["System", *columns] in page.rows
    values = ["25.0 \u00b1 2.5", "30.0 \u00b1 3.0", "35.0 \u00b1 3.5", "40.0 \u00b1 4.0", "30.0", "35.0"]
    assert page.row("most frequent label")[1:] == values
    values = ["62.5 \u00b1 6.2", "67.5 \u00b1 6.8", "72.5 \u00b1 7.2", "77.5 \u00b1 7.8", "67.5", "72.5"]
    assert page.row("top-2 of 4 experts, posterior, held")[1:] == values
    one = Page(render_report(make_data(fewshot=accuracies("mood", 0.5))))
    assert ["System", "mood, likelihood", "mood, calibrated"] in one.rows
    assert page.row("top-2 of 4 experts, posterior, running")[1] == "75.0 \u00b1 7.5"
    assert "Few-shot" not in render_report(make_data())


def test_numbers_of_the_other_tables_appear() -> None:
    page = Page(render_report(make_data()))
    assert page.row("law")[1:] == ["0.634", "31.7", "50.0", "ensemble", "73,231"]
    assert page.row(HOSTILE)[1:] == ["1.20", "60.0", "50.0", "dense", "84,341"]
    assert [row for row in page.rows if row[0] == "law"][1][1:] == ["0", "10", "20", "30"]
    assert page.row("dense")[1:] == ["3.500", "5", "8,000,000", "40,000"]
    assert page.row("seed")[1] == "3.500"
    assert ["seed", "3 min 12 s", HOSTILE] in page.rows
    assert "103 documents, 33.0 k tokens" in page.text("article")
    assert "29 % of 103 sampled" in page.text("article")
    for number in ("0.083 %", "0.437", "0.612", "1.57", "23 iterations"):
        assert number in page.text("facts")


@pytest.mark.parametrize(
    ("scale", "headline"),
    [
        (1.0, "The ensemble (top-2 of 4 experts, posterior routing) reaches perplexity 40.0 against 50.0 of the dense "
              "model of the same training tokens: ratio 0.800 [0.784, 0.816]."),
        (1.5, "The dense model of the same training tokens wins: perplexity 50.0 against 60.0 of the best ensemble "
              "(top-2 of 4 experts, posterior routing): ratio 1.20 [1.18, 1.22]."),
        (1.24, "No clear winner: the ensemble (top-2 of 4 experts, posterior routing) reaches perplexity 49.6 against "
               "50.0 of the dense model of the same training tokens: ratio 0.992 [0.972, 1.01], an interval that "
               "includes 1."),
    ],
)  # fmt: skip
def test_headline_says_how_it_came_out(scale: float, headline: str) -> None:
    """The page and the terminal say the same."""
    rows = results(scale)
    assert Page(render_report(make_data(results=rows))).text("headline") == headline
    assert verdict(rows[1], rows[4]).striptags() == headline


def test_header_says_what_the_ensemble_costs() -> None:
    rows = results()
    header = Page(render_report(make_data(results=rows))).text("header")
    assert "This ensemble takes 2.00 times the dense control's compute per token" in header
    best = "the best ensemble (top-1 of 4 experts, embedding) reaches 46.0: ratio 0.920 [0.902, 0.938]"
    assert f"At 1.00 times the dense control's inference compute, {best}" in header
    rows = [row | {"infer_flops_per_token": 4e6} if row["system"] == "cbtm" else row for row in rows]
    rows[1]["train_tokens"] = 8_000_000
    header = Page(render_report(make_data(results=rows))).text("header")
    assert "No ensemble here runs at about the dense control's inference compute." in header
    assert "the dense model, whose training tokens differ (8.00 M against 20.0 M)" in header


def test_texts_are_escaped_and_nothing_is_loaded() -> None:
    html = render_report(make_data())
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not {"script", "img", "iframe", "object", "embed"} & names
    assert HOSTILE not in html
    assert {attrs.get("rel") for tag, attrs in page.tags if tag == "link"} == {"icon"}
    links = [
        attrs[key] or "" for _, attrs in page.tags for key in ("href", "src", "xlink:href", "action") if key in attrs
    ]
    assert [link for link in links if not link.startswith("#")] == ["data:,"]
    assert not [word for word in ("http:", "https:", "@import", "url(//") if word in html]
    assert all(HOSTILE in page.text(name) for name in ("title", "h1", "blockquote", "pre", "article", "reading"))


def test_ids_are_unique_and_references_resolve() -> None:
    page = Page(render_report(make_data()))
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert max(ids.values()) == 1
    assert {attrs["href"][1:] for _, attrs in page.tags if (attrs.get("href") or "").startswith("#")} <= set(ids)


def test_long_samples_are_shortened() -> None:
    blockquotes = Page(render_report(make_data())).text("blockquote")
    assert 4 * 380 < blockquotes.count("long ") * 5 < 4 * 400
    assert blockquotes.count("...") == 4


def test_two_renders_are_equal() -> None:
    assert render_report(make_data()) == render_report(make_data())


def test_a_prefix_has_a_row_with_both_ways_and_the_share_of_the_gain_is_named() -> None:
    html = render_report(make_data())
    assert "keeps 40 [20, 60] % of its gain" in html
    assert ["32", "ngram", "1", "0.944 [0.924, 0.964]", "0.920 [0.900, 0.940]", "8,680"] in Page(html).rows


def test_optional_parts_may_be_absent() -> None:
    data = make_data()
    clusters = [cluster | {"domains": {}, "samples": [], "top_terms": []} for cluster in data.clusters]
    clustering = data.clustering | {"nmi": None, "purity": None, "refined": []}
    empty = {"prefixes": [], "domain_rows": [], "map2d": {}, "sample_text": [], "curves": {}, "stages": []}
    page = Page(render_report(make_data(clusters=clusters, clustering=clustering, **empty)))
    assert [tag for tag, _ in page.tags].count("svg") == 1
    assert "NMI" not in page.text("facts")
    assert not {"domains", "training", "prefixes"} & {attrs.get("id") for _, attrs in page.tags}


def test_a_diverged_model_does_not_hide_the_report() -> None:
    rows = results()
    rows[0] |= dict.fromkeys(("ppl", "ppl_low", "ppl_high", "ratio_to_dense", "loss_nats"), math.inf)
    diverged = [point | {"loss_nats": math.nan} for point in curve(100)]
    page = Page(render_report(make_data(results=rows, curves={"expert 0002": diverged})))
    assert page.row("seed, before branching")[1].startswith("inf")
    assert page.row("expert 0002")[1] == "nan"


def test_tokens_keep_whitespace_and_name_their_expert() -> None:
    page = Page(render_report(make_data()))
    assert page.texts["reading"].strip("\n").startswith(f"2{HOSTILE} the\n11    end")
    assert [attrs["title"] for _, attrs in page.tags if (attrs.get("title") or "").startswith("expert")] == [
        "expert 2, weight 0.50", "expert 2, weight 1.00", "expert 11, weight 0.25",
    ]  # fmt: skip


def test_heat_map_orders_domains_by_their_main_cluster() -> None:
    rows = heat_map([{"domains": {"b": 1, "a": 3}}, {"domains": {"b": 9, "c": 2}}])
    assert [(row["domain"], row["counts"]) for row in rows] == [("a", [3, 0]), ("c", [0, 2]), ("b", [1, 9])]
    assert rows[2]["shares"] == [0.1, 0.9]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (sig(0.82567), "0.826"), (sig(9.999), "10.0"), (sig(1234.0), "1,230"), (sig(0.0), "0"), (sig(None), "-"),
        (sig(2.5e-9), "2.50e-09"), (sig(math.inf), "inf"), (sig(3.68888, 4), "3.689"), (exact(None), "-"),
        (exact(1234567), "1,234,567"), (scaled(950), "950"), (scaled(1_600_000), "1.60 M"), (scaled(None), "-"),
        (scaled(2.31e15, "kMGTPEZY"), "2.31 P"), (scaled(999_999), "1.00 M"), (scaled(2.5e18), "2,500,000 T"),
        (duration(7.41), "7.4 s"), (duration(59.7), "1 min 0 s"), (duration(7260), "2 h 1 min"),
    ],
)  # fmt: skip
def test_number_formats(number: str, text: str) -> None:
    assert Page(f"<p>{number}</p>").text("p") == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"results": [row for row in results() if row["system"] != "dense"]},
            "results=.*one row of 'dense'.*Run the eval",
        ),
        ({"results": results()[:2]}, "at least one of 'cbtm'"),
        ({"results": [{**row, "chosen": False} for row in results()]}, "results=0 rows are 'chosen'"),
        ({"results": [{"system": "dense"}]}, r"results\[0\] has no .*n_clusters.*it needs all of"),
        ({"map2d": {"x": [1.0], "y": [], "cluster": []}}, r"map2d has lists of lengths \[0, 1\]"),
    ],
)
def test_wrong_data_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_data(**changes)


def test_data_is_plain_values() -> None:
    assert ReportData(**json.loads(json.dumps(dataclasses.asdict(make_data())))) == make_data()
