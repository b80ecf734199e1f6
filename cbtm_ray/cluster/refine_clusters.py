"""Clusters of the sample refined by likelihood, as tasks over the cluster: the rounds of `likelihood.py`.

Shards of tokens stand in Ray's object store, and every step is a task, which Ray may repeat. Whole numbers are added up and
every document is scored alone, so that the outcome does not depend on the tasks' number or places.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from cbtm_ray import files, progress
from cbtm_ray.cluster.describe import agreement
from cbtm_ray.cluster.likelihood import Refined, Tokens, fit_model, refine, token_shards
from cbtm_ray.cluster.shard_steps import SHARD_ROWS
from cbtm_ray.corpus.tokenizer import load_tokenizer, vocabulary_size
from cbtm_ray.manifests import RefineRound
from cbtm_ray.run import Run

REFINED_STATE = "_refined.npz"


class TaskShards:
    """Shards in the object store; a step runs on all of them at once, as tasks of one CPU."""

    def __init__(self, shards: list[Any]) -> None:
        self._shards = [ray.put(shard) for shard in shards]

    def each(self, step: Callable[..., Any], *args: Any) -> list[Any]:
        held, work = [ray.put(arg) for arg in args], ray.remote(step)
        return ray.get([work.remote(shard, *held) for shard in self._shards])


def refine_clusters(
    run: Run,
    documents: list[np.ndarray],
    labels_N: np.ndarray,
    domains: list[str | None],
    folder: str,
    *,
    balanced: bool,
) -> tuple[Refined, list[RefineRound]]:
    """Refine the clusters of the sample with the settings of `cluster`; a call that finds a finished round goes on from there.

    Writes `ngrams/` of the folder, the tables by which a document is assigned.
    """
    wanted, tokenizer = run.config.cluster, load_tokenizer(run.uri("tokenizer"))
    sizes = Tokens(vocabulary_size(tokenizer), wanted.n_clusters, int(tokenizer.eos_token_id))
    each = TaskShards(token_shards(documents, wanted.refine_tokens, SHARD_ROWS)).each
    state_uri = run.uri(folder, REFINED_STATE)
    identity = files.fingerprint([vars(sizes), balanced, wanted.refine_tokens, labels_N.tolist()])
    start, done = _load_state(state_uri, identity) or (Refined(0, labels_N, labels_N, 1.0, 0.0), [])
    state = start
    with progress.bar("refine clusters", wanted.refine_rounds, "rounds") as shown:
        for state in refine(each, start, sizes, rounds=wanted.refine_rounds, balanced=balanced):
            done.append(_describe(state, domains, wanted.n_clusters))
            _save_state(state_uri, identity, state, done)
            shown(state.round)
    fit_model(each, state.labels_N, sizes).tables().save(run.uri(folder, "ngrams"))
    return state, done


def _describe(state: Refined, domains: list[str | None], n_clusters: int) -> RefineRound:
    largest = np.bincount(state.best_N).max() * n_clusters / len(state.best_N)
    return {
        "moved": state.moved,
        "evidence_nats": state.evidence_nats,
        "size_skew": float(largest),
        **agreement(state.best_N, domains),
    }


def _save_state(uri: str, identity: str, state: Refined, done: list[RefineRound]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, identity=identity, done=json.dumps(done), labels_N=state.labels_N, best_N=state.best_N)
    files.write_bytes(uri, buffer.getvalue())


def _load_state(uri: str, identity: str) -> tuple[Refined, list[RefineRound]] | None:
    """The last finished round of these documents and settings, and the rounds so far."""
    if not files.exists(uri):
        return None
    with np.load(io.BytesIO(files.read_bytes(uri)), allow_pickle=False) as saved:
        if str(saved["identity"]) != identity:
            return None
        done = json.loads(str(saved["done"]))
        last = done[-1]
        return Refined(len(done), saved["labels_N"], saved["best_N"], last["moved"], last["evidence_nats"]), done
