"""What to train: the seed, the experts and the controls, each with its start, its documents and its share of the budget.

The runs' controllers and workers import this file too, so what takes seconds to import is imported inside a function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cbtm_ray import files
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER, MOE_FOLDER, expert_folder, partition_folder
from cbtm_ray.train.spec import TrainSpec


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One independent training run: what to start from, whose documents to read, how to train."""

    cluster: int | None
    """Cluster whose documents are read; None reads all."""
    partition: str | None = None
    """Folder of the run that says which cluster a document is of: a control's. None: the shards themselves say."""
    init: str | None
    """Model to start from, a folder URI or a Hugging Face name; None is a new model."""
    upcycled_experts: int | None = None
    """Experts that the model is upcycled to before training. None: it stays as it is."""
    spec: TrainSpec


def seed_branch(run: Run) -> Branch:
    """The seed's own training. UserError if a mixture of experts is to be made of a given model, and cannot be."""
    config, seed, init = run.config, run.config.seed_model, run.config.seed_model.name_or_path
    if init and files.exists(init):
        init = files.absolute(init)
    if init and "moe" in config.train.controls:
        _check_upcyclable(init)
    spec = TrainSpec(
        name="seed",
        steps=-(-seed.train_tokens // config.tokens_per_step),
        sequence_length=config.tokens.sequence_length,
        train=replace(
            config.train,
            learning_rate=seed.learning_rate,
            final_lr_fraction=seed.final_lr_fraction,
            trainable="all",
        ),
    )
    return Branch(cluster=None, init=init, spec=spec)


def expert_branches(run: Run) -> list[Branch]:
    """The dense control and the K experts, the longest first.

    The control gets as many tokens as all experts together (the paper's compute-matched comparison), so that K = 1 and
    the dense control are the same run, where all weights are trained.
    """
    steps_K = expert_steps(run)
    return [
        _branch(run, DENSE_FOLDER, None, sum(steps_K)),
        *(
            _branch(run, expert_folder(k), k, steps_K[k])
            for k in sorted(range(len(steps_K)), key=lambda k: -steps_K[k])
        ),
    ]


def control_branches(run: Run, control: str) -> list[Branch]:
    """The experts of a control, one for each of its clusters: a budget of the same size, shared in the same way.

    That of 'moe' is one model, which reads all documents.
    """
    if control == "moe":
        return [_moe_branch(run)]
    partition = partition_folder(control)
    return [
        _branch(run, expert_folder(cluster, control), cluster, steps, partition)
        for cluster, steps in enumerate(expert_steps(run, control))
    ]


def _moe_branch(run: Run) -> Branch:
    """The seed upcycled, with the steps of the dense control. UserError if it cannot be."""
    branch = _branch(run, MOE_FOLDER, None, sum(expert_steps(run)))
    if run.config.train.warm_start:  # from a mixture of experts
        return branch
    _check_upcyclable(run.uri("seed"))
    return replace(branch, upcycled_experts=run.config.cluster.n_clusters)


def _check_upcyclable(uri_or_name: str) -> None:
    """Before anything is trained for it."""
    from cbtm_ray.branch.upcycle import check_upcyclable  # seconds, which a run's controller has no use for

    check_upcyclable(uri_or_name)


def start_model(run: Run, name: str) -> str:
    """Folder of the model that an expert or control begins with."""
    other = run.config.train.warm_start
    return run.uri("seed") if other is None else files.join(files.absolute(other), name)


def _branch(run: Run, name: str, cluster: int | None, steps: int, partition: str | None = None) -> Branch:
    config = run.config
    train = replace(config.train, trainable="all") if cluster is None else config.train  # one model of all documents
    spec = TrainSpec(name=name, steps=steps, sequence_length=config.tokens.sequence_length, train=train)
    return Branch(cluster=cluster, partition=partition, init=start_model(run, name), spec=spec)


def expert_steps(run: Run, control: str | None = None) -> list[int]:
    """Optimizer steps (K,) of each expert, of the clusters or of a control's.

    They get total/K tokens (the paper's rule), or tokens in proportion to their clusters' own; either way the sum is K times
    total/K, rounded down to whole steps.
    """
    config, folder = run.config, partition_folder(control) if control else "shards"
    n_clusters = run.require(folder, "partition_corpus")["n_clusters"] if control else config.cluster.n_clusters
    equal = config.steps_each(n_clusters)
    if config.train.budget == "equal":
        return [equal] * n_clusters
    manifest = run.require(folder, "partition_corpus")
    clusters = (manifest if control else manifest["train"])["clusters"]
    return in_proportion(n_clusters * equal, [row["tokens"] for row in clusters])


def in_proportion(steps: int, weights_K: list[int]) -> list[int]:
    """Whole shares (K,) of at least 1 that sum to `steps` (at least K), each as near to its weight's part as that allows."""
    exact_K = steps * np.asarray(weights_K) / sum(weights_K)
    shares_K = np.maximum(np.floor(exact_K).astype(int), 1)
    while (missing := steps - shares_K.sum()) > 0:
        shares_K[np.argmax(exact_K - shares_K)] += 1
    for _ in range(-missing):
        shares_K[np.argmax(np.where(shares_K > 1, shares_K - exact_K, -np.inf))] -= 1
    return shares_K.tolist()
