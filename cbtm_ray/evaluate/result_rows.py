"""The rows of evaluation/results.json and of the report, and the names of their systems.

mypy checks the keys where rows are written and read, `missing_keys` those of rows out of a file.
"""

# No `from __future__ import annotations` here: with it a TypedDict does not know which of its keys may be missing.
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

SYSTEM_NAMES = {
    "seed": "seed, before branching",
    "dense": "dense control",
    "moe": "mixture of experts",
    "merged": "experts merged into one model",
    "majority": "most frequent label",
}
"""Systems that do not route."""


class Summary(TypedDict):
    """Perplexity and its like. Intervals are 95 % bootstrap over documents."""

    ppl: float
    ppl_low: float
    ppl_high: float
    ratio_to_dense: float
    ratio_low: float
    ratio_high: float
    loss_nats: float
    bpb: float
    """Bits per byte."""


class DomainSummary(Summary):
    domain_ppl: dict[str, float]
    """By gold domain; empty without them."""


ORACLE = "oracle"
"""The `routing` of rows that are no routing."""
ORACLE_MEANING = "the best single expert for each document, in hindsight: what is left for routing to gain"


class Trained(TypedDict):
    """A system, and what it took to train."""

    system: str
    """'seed', 'dense', 'moe', 'merged', 'cbtm' (the ensemble), or a control with experts."""
    n_clusters: int
    train_tokens: int
    train_flops: float


class ResultRow(Trained, DomainSummary):
    """A system on the reported documents."""

    top_k: int
    routing: str | None
    """None: the system does not route."""
    infer_flops_per_token: float
    settings: NotRequired[dict[str, float]]
    """The settings of the router, tuned for this top_k."""
    tuning_loss_nats: NotRequired[float]
    chosen: NotRequired[bool]
    """True for the mixture of the ensemble with the least loss on the tuning documents."""
    served: NotRequired[bool]
    """True for the mixture of the ensemble that the endpoint serves if not told otherwise."""


class GainShare(TypedDict):
    """The share of a gain in loss that is left, with its 95 % interval; None where the gain itself may be none."""

    share: float
    low: float | None
    high: float | None


class PrefixRow(TypedDict):
    """The ensemble on the tokens after the first `prefix_tokens` of the longer documents; see `prefix_curve.py`."""

    prefix_tokens: int
    routing: str
    top_k: int
    held: bool
    """Whether the weights stay from there on."""
    tokens: int
    loss_nats: float
    ratio_to_dense: float
    ratio_low: float
    ratio_high: float
    gain: NotRequired[GainShare]
    """In the row of n-grams that are held, with one expert: of the gain that n-grams that go on have over the embedding."""


class DomainRow(TypedDict):
    """The dense control and the chosen ensemble on the held-out text of one gold domain."""

    domain: str
    tokens: int
    dense_ppl: float
    cbtm_ppl: float
    weights: list[float]
    """Mean weight of each expert over the tokens."""


class SampleToken(TypedDict):
    """A token of a held-out text, and the expert of most weight."""

    token: str
    expert: int
    weight: float


class FewshotRow(TypedDict):
    """Accuracy (0..1) of a system on a task, over the draws of the examples shown."""

    task: str
    system: str
    n_clusters: int
    top_k: int
    routing: str | None
    weights: str | None
    """'held' from the prompt on, or 'running'; None: nothing is mixed."""
    scoring: str
    """'likelihood' or 'calibrated', see `fewshot.py`."""
    examples: int
    accuracy: float
    accuracy_std: float
    accuracies: list[float]


class Evaluation(TypedDict):
    """evaluation/results.json."""

    rows: list[ResultRow]
    routers: dict[str, dict[str, dict[str, float]]]
    """The ensemble's routers: name -> top_k -> the settings tuned for it, for every top_k that the router can mix."""
    prefix_tokens: int
    prefixes: NotRequired[list[PrefixRow]]
    domains: list[DomainRow]
    tuned_on_documents: int
    reported_on_documents: int
    reported_tokens: int
    sample: list[SampleToken]
    fewshot: list[FewshotRow]


def missing_keys(row: Mapping[str, object], kind: Any) -> list[str]:
    """The keys that a row of this kind (a TypedDict) must have and has not."""
    return [key for key in kind.__annotations__ if key in kind.__required_keys__ and key not in row]


def experts_name(row: ResultRow | FewshotRow) -> str:
    """How many experts are mixed: 'top-2 of 8 experts'; the oracle's 'best of 8 experts in hindsight'."""
    if row["routing"] == ORACLE:
        return f"best of {row['n_clusters']} experts in hindsight"
    if row["top_k"] == row["n_clusters"]:
        return f"all {row['n_clusters']} experts"
    return f"top-{row['top_k']} of {row['n_clusters']} experts"


def system_name(row: ResultRow | FewshotRow) -> str:
    """The name of a row's system, without its routing."""
    if row["system"] in SYSTEM_NAMES:
        return SYSTEM_NAMES[row["system"]]
    return experts_name(row) if row["system"] == "cbtm" else f"{row['system']}, {experts_name(row)}"


def row_name(row: ResultRow | FewshotRow) -> str:
    """The name of a row's system with its routing: 'top-2 of 8 experts, posterior'."""
    return system_name(row) if row["routing"] is None else f"{system_name(row)}, {row['routing']}"
