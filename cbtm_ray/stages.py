"""The stages of a run: their folders, the settings that each depends on, and the stages that each is made from."""

from __future__ import annotations

from cbtm_ray.config import CONTROLS, EXPERTS_ONLY_FIELDS, PARTITION_CONTROLS

_TRAINING = ("train", "-train.controls", "tokens.sequence_length")
_ONE_MODEL = (*_TRAINING, "-train.trainable")  # trains all weights

STAGE_SETTINGS: dict[str, tuple[str, ...]] = {
    "corpus": ("run", "corpus"),
    "tokenizer": ("tokens.tokenizer", "tokens.vocab_size"),
    "clusterer": ("embed", "cluster"),
    "shards": (),
    "ngrams": ("ngrams",),
    "seed": ("seed_model", "train", *(f"-{name}" for name in sorted(EXPERTS_ONLY_FIELDS)), "tokens.sequence_length"),
    "experts": _TRAINING,
    "controls/dense": _ONE_MODEL,
    **{f"shards/controls/{split}": () for split in PARTITION_CONTROLS},
    **{f"ngrams/controls/{split}": ("ngrams",) for split in PARTITION_CONTROLS},
    **{f"controls/{control}": _ONE_MODEL if control == "moe" else _TRAINING for control in CONTROLS},
    "evaluation": ("evaluate", "tokens.sequence_length", "train.controls"),
    "average": (),
    "export/moe": ("export.moe_top_k", "export.ridge_tokens", "export.router_tokens", "export.router_learning_rate"),
    "export/adapters": ("export.rank", "export.ranks", "export.embeddings"),
    "fewshot": ("evaluate.max_documents",),
}  # fmt: skip
"""The configuration fields that each stage itself depends on: fields, or sections less -fields. Earlier stages have their own.

Each control is a stage of its own, so that a finished run can be given another one."""

FORMER_VALUES = {"cluster.refine": "none"}
"""What versions without a field did, where that is not what its default says."""

_PARTITION, _MODELS = ("corpus", "tokenizer", "clusterer"), ("tokenizer", "shards", "seed")

MADE_FROM: dict[str, tuple[str, ...]] = {
    "corpus": (),
    "tokenizer": ("corpus",),
    "clusterer": ("corpus", "tokenizer"),
    "shards": _PARTITION,
    "ngrams": (*_PARTITION, "shards"),
    "seed": ("corpus", "tokenizer"),
    "experts": _MODELS,
    "controls/dense": _MODELS,
    **{f"shards/controls/{split}": (*_PARTITION, "shards") for split in PARTITION_CONTROLS},
    **{f"ngrams/controls/{split}": (*_PARTITION, "shards", f"shards/controls/{split}") for split in PARTITION_CONTROLS},
    **{f"controls/{split}": (*_MODELS, f"shards/controls/{split}") for split in PARTITION_CONTROLS},
    "controls/moe": _MODELS,
    "evaluation": ("tokenizer", "clusterer", "shards", "ngrams", "seed", "experts", "controls/dense",
                   *(f"{stage}/controls/{split}" for stage in ("shards", "ngrams") for split in PARTITION_CONTROLS),
                   *(f"controls/{control}" for control in CONTROLS)),
    "average": ("tokenizer", "clusterer", "shards", "experts", "controls/dense", "evaluation"),
    "export/moe": ("tokenizer", "clusterer", "shards", "experts", "controls/dense", "evaluation"),
    "export/adapters": ("tokenizer", "clusterer", "shards", "ngrams", "seed", "experts", "controls/dense", "evaluation"),
    "fewshot": ("tokenizer", "shards"),
}  # fmt: skip
"""The stages that each stage reads. The seed reads all documents of the shards, whatever their clusters: the seed of a sweep
serves every number of clusters."""


SHAREABLE = ("corpus", "tokenizer", "clusterer", "shards", "ngrams", "seed")
"""Stages that a run may take from another; a control's partition is kept beside the shards that it is one of."""


DENSE_FOLDER, MOE_FOLDER = "controls/dense", "controls/moe"


def expert_folder(cluster: int, control: str | None = None) -> str:
    """Folder of an expert's model in the run directory."""
    return f"{f'controls/{control}' if control else 'experts'}/cluster={cluster:04d}"


def partition_folder(control: str) -> str:
    """Folder of the control's cluster of every document."""
    return f"shards/controls/{control}"


def ngrams_folder(control: str) -> str:
    """Folder of the n-gram tables of the control's clusters."""
    return f"ngrams/controls/{control}"


def before(stage: str) -> list[str]:
    """All stages that a stage comes after, in their order."""
    return list(dict.fromkeys(each for name in MADE_FROM[stage] for each in (*before(name), name)))
