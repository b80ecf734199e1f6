"""What a report is made of in tests, and what a test asks of the page."""

from __future__ import annotations

import dataclasses
import math
from html.parser import HTMLParser
from typing import Any

from cbtm_ray.report.page import ReportData

HOSTILE = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """What a test asks of a page: its tags with attributes, table rows, <data> values, and the text of a class."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.values: list[float] = []
        self.texts: dict[str, str] = {}
        self._path: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "data":
            self.values.append(float(attributes["value"] or "nan"))
        if tag not in ("meta", "link", "br"):
            self._path.append(f"{tag} {attributes.get('class', '')}")

    def handle_endtag(self, tag: str) -> None:
        self._path.pop()

    def handle_data(self, data: str) -> None:
        names = set(" ".join(self._path).split())
        for name in names:
            self.texts[name] = self.texts.get(name, "") + data
        if {"td", "th"} & names:
            self.rows[-1][-1] += data

    def text(self, name: str) -> str:
        return " ".join(self.texts.get(name, "").split())

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row[0] == first)


def result(
    system: str, ppl: float, ratio: float, top_k: int | None = None, routing: str | None = None
) -> dict[str, Any]:
    return {
        "system": system, "n_clusters": 4, "top_k": top_k, "routing": routing, "ppl": ppl, "ppl_low": ppl * 0.97,
        "ppl_high": ppl * 1.03, "ratio_to_dense": ratio, "ratio_low": ratio * 0.98, "ratio_high": ratio * 1.02,
        "loss_nats": math.log(ppl), "bpb": math.log(ppl) / 2.1, "train_tokens": 20_000_000, "train_flops": 2.763e13,
        "infer_flops_per_token": 460_000 * (top_k or 1), "tuning_loss_nats": math.log(ppl),
        "chosen": (routing, top_k) == ("posterior", 2), "domain_ppl": {"law": ppl - 5, HOSTILE: ppl + 5},
    }  # fmt: skip


def results(scale: float = 1.0) -> list[dict[str, Any]]:
    """A seed, a dense control of perplexity 50, and ensembles whose best (posterior, top-2) has 40 * scale."""
    ensembles = [("embedding", 1, 46.0), ("embedding", 4, 45.0), ("posterior", 2, 40.0), ("posterior", 4, 40.5)]
    rows = [result("cbtm", ppl * scale, ppl * scale / 50, k, routing) for routing, k, ppl in ensembles]
    rows[0]["served"] = True
    return [result("seed", 57.0, 1.14), result("dense", 50.0, 1.0, 1), *rows]


def curve(tokens: int) -> list[dict[str, Any]]:
    return [
        {"step": s, "tokens": tokens * s // 5, "loss_nats": 4.0 - 0.1 * s, "tokens_per_s": 40_000 + s}
        for s in range(1, 6)
    ]


def make_data(**changes: Any) -> ReportData:
    clusters = [
        {"cluster": j, "documents": 100 + j, "tokens": 33_000 + j, "top_terms": [f"term{j}", HOSTILE],
         "samples": [HOSTILE, "long " * 200], "domains": {"law": 10 * j, HOSTILE: 100 - 9 * j}}
        for j in range(4)
    ]  # fmt: skip
    data = ReportData(
        title=HOSTILE,
        config_yaml=f"run:\n  dir: {HOSTILE}\n",
        stages=[
            {"stage": "seed", "seconds": 192.0, "summary": HOSTILE},
            {"stage": "experts", "seconds": 7.41, "summary": "4"},
        ],
        clusters=clusters,
        clustering={
            "nmi": 0.4371,
            "purity": 0.6123,
            "gap": 0.00083,
            "n_iter": 23,
            "balanced": True,
            "size_skew": 1.571,
            "refined": [
                {"moved": 0.164, "evidence_nats": 250.0, "size_skew": 1.5, "nmi": 0.45, "purity": 0.6},
                {"moved": 0.049, "evidence_nats": 260.0, "size_skew": 1.6, "nmi": 0.46, "purity": 0.6},
            ],
        },
        prefixes=[
            {
                "prefix_tokens": n,
                "routing": routing,
                "top_k": k,
                "held": held,
                "tokens": 9000 - 10 * n,
                "loss_nats": math.log(ratio),
                "ratio_to_dense": ratio,
                "ratio_low": ratio - 0.02,
                "ratio_high": ratio + 0.02,
                **({"gain": {"share": 0.405, "low": 0.2, "high": 0.6}} if (routing, held) == ("ngram", True) else {}),
            }
            for n in (8, 32, 128)
            for routing, k, held, ratio in (
                ("oracle", 1, False, 0.9),
                ("embedding", 1, True, 0.97),
                ("embedding", 1, False, 0.96),
                ("ngram", 1, True, 0.95 - n / 5000),
                ("ngram", 1, False, 0.92),
            )
        ],
        curves={
            "seed": curve(12_000_000),
            "dense": curve(8_000_000),
            "expert 0000": curve(2_000_000),
            "expert 0003": [],
        },
        results=results(),
        domain_rows=[
            {
                "domain": HOSTILE,
                "tokens": 84_341,
                "dense_ppl": 50.0,
                "cbtm_ppl": 60.0,
                "weights": [0.001, 0.25, 0.25, 0.499],
            },
            {"domain": "law", "tokens": 73_231, "dense_ppl": 50.0, "cbtm_ppl": 31.7, "weights": [0.7, 0.3, 0.0, 0.0]},
        ],
        routing={
            "temperature": 0.3,
            "beta": 1.0,
            "gamma": 0.95,
            "tuned_on_documents": 613,
            "reported_on_documents": 614,
        },
        map2d={"x": [0.0, 1.0, 2.0], "y": [0.0, 1.0, 0.0], "cluster": [0, 3, 3]},
        sample_text=[
            {"token": HOSTILE, "expert": 2, "weight": 0.5},
            {"token": " the\n", "expert": 2, "weight": 1.0},
            {"token": "    end", "expert": 11, "weight": 0.25},
        ],
    )
    return dataclasses.replace(data, **changes)
