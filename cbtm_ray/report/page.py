"""report.html: one self-contained page that says how a run came out, and from what.

No script, no request to anywhere, the same bytes for the same data. Plots are SVG inside the page whose ink is
`currentColor`, so that they follow the reader's light or dark theme; series differ in marker and line style too.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.axes import Axes

from cbtm_ray.errors import UserError
from cbtm_ray.evaluate.prefix_curve import gain_sentence
from cbtm_ray.evaluate.result_rows import (
    ORACLE,
    ORACLE_MEANING,
    DomainRow,
    FewshotRow,
    PrefixRow,
    ResultRow,
    SampleToken,
    experts_name,
    missing_keys,
    row_name,
)
from cbtm_ray.manifests import CurvePoint
from cbtm_ray.merge.routers import ROUTERS
from cbtm_ray.report import plots

Row = dict[str, Any]

MAX_HEAT_MAP_DOMAINS = 40
MEANINGS = {**{name: router.meaning for name, router in ROUTERS.items()}, ORACLE: f"No router: {ORACLE_MEANING}."}
_ROWS: dict[str, Any] = {
    "results": ResultRow,
    "domain_rows": DomainRow,
    "sample_text": SampleToken,
    "fewshot": FewshotRow,
    "prefixes": PrefixRow,
}


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The data that the page shows, as plain values."""

    title: str
    """Heading of the page, e.g. the run's name."""
    config_yaml: str
    """The resolved configuration, shown as it is."""
    stages: list[Row]
    """stage, seconds (wall clock), summary (one line): in the order they ran."""
    clusters: list[Row]
    """cluster (id), documents, tokens, top_terms, samples (texts nearest the center), domains (name -> documents)."""
    clustering: Row
    """nmi, purity (None: no domains), gap (relative, to the bound), n_iter, balanced, size_skew (largest / mean), refined
    (`RefineRound`s)."""
    curves: dict[str, list[CurvePoint]]
    """By name: "seed", "dense", "expert 0003"."""
    results: list[ResultRow]
    """One has system "dense", at least one "cbtm", one of these `chosen`: the best on the tuning half."""
    domain_rows: list[DomainRow] = field(default_factory=list)
    routing: Row
    """temperature, beta, gamma: the chosen values; tuned_on_documents, reported_on_documents: two disjoint sets."""
    map2d: dict[str, list[Any]] = field(default_factory=dict)
    """x, y, cluster: a sample of documents in two dimensions (2,000 are plenty). May be empty."""
    sample_text: list[SampleToken] = field(default_factory=list)
    fewshot: list[FewshotRow] = field(default_factory=list)
    prefixes: list[PrefixRow] = field(default_factory=list)
    adapters: Row | None = None
    """The manifest of the experts as adapters of the seed, if they were extracted."""

    def __post_init__(self) -> None:
        for name, kind in _ROWS.items():
            for i, row in enumerate(getattr(self, name)):
                if missing := missing_keys(row, kind):
                    keys = ", ".join(missing_keys({}, kind))
                    raise UserError(f"{name}[{i}] has no {', '.join(missing)}; it needs all of: {keys}.")
        systems = Counter(row["system"] for row in self.results)
        if systems["dense"] != 1 or not systems["cbtm"]:
            found = f"results={dict(systems)} must hold one row of 'dense' and at least one of 'cbtm'"
            raise UserError(f"{found}. Run the evaluation of the dense control and of the ensemble again.")
        if (chosen := sum(bool(row.get("chosen")) for row in self.results)) != 1:
            raise UserError(
                f"results={chosen} rows are 'chosen'; exactly one ensemble is, the best on the tuning half."
            )
        if len(lengths := {len(self.map2d.get(key, ())) for key in ("x", "y", "cluster")}) > 1:
            raise UserError(f"map2d has lists of lengths {sorted(lengths)}; x, y and cluster must be equally long.")


def render_report(data: ReportData) -> str:
    """The page as HTML."""
    dense = next(row for row in data.results if row["system"] == "dense")
    ensembles = [row for row in data.results if row["system"] == "cbtm" and row["routing"] != ORACLE]
    best = next(row for row in ensembles if row.get("chosen"))
    routings = {row["routing"] for row in data.results}
    curves = {name: points for name, points in data.curves.items() if points}
    speeds = {name: statistics.median(point["tokens_per_s"] for point in points) for name, points in curves.items()}
    seed = {name: points for name, points in curves.items() if name == "seed"}
    branched = {name: points for name, points in curves.items() if name != "seed"}
    drawings: dict[str, tuple[str, Callable[[Axes], None], Any]] = {
        "prefixes": ("Ratio against prefix", lambda axes: plots.draw_prefixes(axes, data.prefixes), data.prefixes),
        "perplexity": ("Perplexity against top-k", lambda axes: plots.draw_results(axes, data.results), True),
        "branched": ("Training loss after branching", lambda axes: plots.draw_curves(axes, branched), branched),
        "seed": ("Training loss of the seed", lambda axes: plots.draw_curves(axes, seed), seed),
        "map": ("Documents in two dimensions", lambda axes: plots.draw_map(axes, data.map2d), data.map2d.get("x")),
    }
    figures = {name: plots.plot(name, label, draw) if there else "" for name, (label, draw, there) in drawings.items()}
    ratios = sorted(((row["cbtm_ppl"] / row["dense_ppl"], row) for row in data.domain_rows), key=lambda pair: pair[0])
    return page_template("report.html.j2").render(
        data=data, dense=dense, best=best, ensembles=ensembles, plots=figures, speeds=speeds, domain_ratios=ratios,
        heat_map=heat_map(data.clusters), max_domains=MAX_HEAT_MAP_DOMAINS, palette=plots.PALETTE,
        prefixes=_prefix_pairs(data.prefixes), gain=gain_sentence(data.prefixes),
        fewshot=fewshot_by_system(data.fewshot), fewshot_columns=fewshot_columns(data.fewshot),
        fewshot_means=_fewshot_means(data.fewshot), verdict=verdict(dense, best), best_name=_ensemble_name(best),
        meanings={name: meaning for name, meaning in MEANINGS.items() if name in routings},
    )  # fmt: skip


def _prefix_pairs(rows: list[PrefixRow]) -> list[Row]:
    """One row for each length, routing and top-k, with the rows of both ways: held (None for the oracle), and going on."""
    found: dict[tuple[int, str, int], Row] = {}
    for row in rows:
        key = row["prefix_tokens"], row["routing"], row["top_k"]
        names = dict(zip(("prefix_tokens", "routing", "top_k"), key, strict=True))
        entry = found.setdefault(key, {**names, "tokens": row["tokens"], "held": None})
        entry["held" if row["held"] else "running"] = row
    return list(found.values())


def verdict(dense: ResultRow, best: ResultRow) -> Markup:
    """One sentence on the ensemble that did best on the tuning half, as the other half saw it."""
    interval = Markup('<span class="nowrap">[{}, {}]</span>').format(sig(best["ratio_low"]), sig(best["ratio_high"]))
    ratio = Markup("ratio {} {}").format(sig(best["ratio_to_dense"]), interval)
    control: str = "dense model of the same training tokens"
    if abs(best["train_tokens"] - dense["train_tokens"]) > 0.01 * dense["train_tokens"]:
        tokens = scaled(dense["train_tokens"]), scaled(best["train_tokens"])
        control = Markup("dense model, whose training tokens differ ({} against {})").format(*tokens)
    if best["ratio_low"] > 1:
        form = "The {control} wins: perplexity {dense} against {ppl} of the best {ensemble}: {ratio}."
    elif best["ratio_high"] < 1:
        form = "The {ensemble} reaches perplexity {ppl} against {dense} of the {control}: {ratio}."
    else:
        form = (
            "No clear winner: the {ensemble} reaches perplexity {ppl} against {dense} of the {control}: {ratio}, an "
            "interval that includes 1."
        )
    numbers = {"ppl": sig(best["ppl"]), "dense": sig(dense["ppl"]), "ratio": ratio}
    return Markup(form).format(control=control, ensemble=_ensemble_name(best), **numbers)


def _ensemble_name(row: ResultRow) -> str:
    return f"ensemble ({experts_name(row)}, {row['routing']} routing)"


def page_template(name: str) -> Template:
    """A page beside this file: strict, escaped, with the number filters below."""
    options: dict[str, Any] = {
        "autoescape": True,
        "undefined": StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
    }
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **options)
    environment.filters.update(sig=sig, scaled=scaled, exact=exact, duration=duration, row_name=row_name)
    return environment.get_template(name)


def heat_map(clusters: list[Row]) -> list[Row]:
    """Rows of gold domains: documents in each cluster and their shares; domains of one cluster stand together."""
    totals: Counter[str] = Counter()
    for cluster in clusters:
        totals.update(cluster["domains"])
    rows = []
    for domain, total in totals.most_common(MAX_HEAT_MAP_DOMAINS):
        counts = [cluster["domains"].get(domain, 0) for cluster in clusters]
        rows.append({"domain": domain, "counts": counts, "shares": [count / total for count in counts]})
    return sorted(rows, key=lambda row: (row["counts"].index(max(row["counts"])), -max(row["shares"]), row["domain"]))


def fewshot_by_system(rows: list[FewshotRow]) -> dict[tuple[Any, ...], list[FewshotRow]]:
    """A system's rows of all tasks and scorings together, by (system, routing, top_k, weights), in the order they stand."""
    found: dict[tuple[Any, ...], list[FewshotRow]] = {}
    for row in rows:
        found.setdefault((row["system"], row["routing"], row["top_k"], row["weights"]), []).append(row)
    return found


def fewshot_columns(rows: list[FewshotRow]) -> list[str]:
    """A description of each system in the rows."""
    return list(dict.fromkeys(f"{row['task']}, {row['scoring']}" for row in rows))


def _fewshot_means(rows: list[FewshotRow]) -> dict[str, str]:
    """Over several tasks a column more for the mean of each scoring, by its name."""
    several = len({row["task"] for row in rows}) > 1
    return {f"Mean, {row['scoring']}": row["scoring"] for row in rows} if several else {}


def _number(value: float, text: str | Markup) -> Markup:
    """A rounded number that carries its exact value, for readers who follow it back to results.json."""
    return Markup('<data value="{}">{}</data>').format(value, text)


def _significant(value: float, digits: int) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, decimals)}f}" if decimals < 8 else f"{rounded:.{digits - 1}e}"


def sig(value: float | None, digits: int = 3) -> str | Markup:
    """Three significant digits; '-' for None. 0.82567 -> 0.826, 41.05 -> 41.0, 1234 -> 1,230."""
    return "-" if value is None else _number(value, _significant(value, digits))


def exact(value: float | None) -> str | Markup:
    """Every digit of a count: 1234567 -> 1,234,567."""
    return "-" if value is None else _number(value, f"{value:,}")


def scaled(value: float | None, units: str = "kMBT") -> str | Markup:
    """Three significant digits and a unit of thousands: 1600000 -> 1.60 M, 950 -> 950."""
    if value is None:
        return "-"
    rounded = float(f"{value:.2e}")
    step = min(int(math.log10(rounded) // 3), len(units)) if rounded >= 1000 else 0
    return _number(value, f"{_significant(rounded / 1000**step, 3)} {units[step - 1] if step else ''}".strip())


def duration(seconds: float) -> Markup:
    """Wall-clock time: 7.4 -> 7.4 s, 192 -> 3 min 12 s, 7260 -> 2 h 1 min."""
    whole = round(seconds)
    if whole < 60:
        return _number(seconds, f"{seconds:.1f} s")
    minutes, hours = f"{whole // 60} min {whole % 60} s", f"{whole // 3600} h {whole % 3600 // 60} min"
    return _number(seconds, minutes if whole < 3600 else hours)
