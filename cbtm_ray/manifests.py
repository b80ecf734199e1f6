"""The keys of each stage's `manifest.json`. mypy checks them where stages write manifests and where later stages read them."""

# No `from __future__ import annotations` here: with it a TypedDict does not know which of its keys may be missing.
from typing import Any, NotRequired, TypedDict


class CorpusCounts(TypedDict):
    train_documents: int
    valid_documents: int
    empty_documents: int
    train_bytes: int
    valid_bytes: int
    held_out_duplicates: int
    """Training documents whose text equals a held-out text."""


class CorpusManifest(CorpusCounts):
    """`corpus/`: totals, and one row for each shard, which the partition reads again."""

    sample_documents: int
    deduplicate: str | None
    left_out: dict[str, dict[str, Any]]
    """Why files are not read -> how many `files`, and the name of the `first`."""
    content: str
    shards: list[dict[str, Any]]


class Agreement(TypedDict):
    """Agreement of the clusters with the gold domains; None without gold domains."""

    nmi: float | None
    purity: float | None


class ClusterDescription(Agreement):
    """The clusters on the sample."""

    clusters: list[dict[str, Any]]
    """For each its top terms, nearest texts, gold domains and `sample_documents`."""
    map2d: dict[str, Any]


class RefineRound(Agreement):
    """A round of refining by likelihood: where the documents of the sample would go after it."""

    moved: float
    """Share of the documents that changed their balanced cluster."""
    evidence_nats: float
    """Mean evidence for a document's cluster over the whole corpus's model."""
    size_skew: float
    """The largest cluster's documents over the mean."""


class ClustererManifest(ClusterDescription):
    """`clusterer/`."""

    n_clusters: int
    balanced: bool
    n_iter: int
    """n_iter, inertia and gap are of k-means."""
    inertia: float
    gap: float
    """How far the balanced assignment's cost is above a lower bound, as a share of the cost."""
    refined: list[RefineRound]
    content: str


class ClusterCount(TypedDict):
    cluster: int
    documents: int
    tokens: int


class SplitManifest(TypedDict):
    """The documents of a split of `shards/`, or of a control's partition of the training split."""

    documents: int
    tokens: int
    clusters: list[ClusterCount]
    size_skew: float
    """The largest cluster's documents over the mean."""


class ShardsManifest(TypedDict):
    """`shards/`."""

    train: SplitManifest
    valid: SplitManifest


class CurvePoint(TypedDict):
    """A point of a training curve; `tokens` are those seen so far."""

    step: int
    tokens: int
    loss_nats: float
    tokens_per_s: float
    learning_rate: NotRequired[float]
    mfu: NotRequired[float | None]
    """Model FLOPs utilization, 0..1; None where the device's peak is unknown."""
    valid_loss_nats: NotRequired[float | None]


class TrainedFields(TypedDict):
    epochs: float
    valid_loss_nats: float | None
    """Held-out loss per token of the model's own cluster at the last step; None without held-out documents."""
    valid_tokens: int
    mfu: float | None
    curve: list[CurvePoint]


class ModelFields(TypedDict):
    cluster: int | None
    """None: the model was trained on all clusters."""
    init: str | None
    """The folder of the model that training started from; None: random weights."""
    content: str
    experts: int
    """More than 1 for a mixture of experts."""
    steps: int
    train_tokens: int
    parameters: int
    infer_flops_per_token: float
    train_flops: float


class ModelManifest(ModelFields, TrainedFields):
    """`seed/`, `controls/dense/`, `experts/cluster=KKKK/` and every other folder of a model."""

    workers: int
    seconds: float
    starts: NotRequired[list[dict[str, Any]]]
    ended: NotRequired[float]
