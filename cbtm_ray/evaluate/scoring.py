"""Held-out documents and few-shot prompts, and what every model made of them: each scored once, by Ray, where there is room.

T tokens (of one document after the other), R those of the documents that are reported on, K experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray
import torch
from pyarrow import fs
from torch import Tensor
from transformers import PreTrainedModel

from cbtm_ray import files, progress
from cbtm_ray.cluster.embed import Embedder
from cbtm_ray.cluster.shard_steps import squared_distances
from cbtm_ray.config import Config, task_name
from cbtm_ray.corpus.documents import unit_hash
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.evaluate import perplexity
from cbtm_ray.evaluate.fewshot import Prompts, configured_prompts
from cbtm_ray.evaluate.result_rows import DomainSummary
from cbtm_ray.merge.scores import ScoredHalf
from cbtm_ray.models import load_model
from cbtm_ray.ray_session import check_fits
from cbtm_ray.run import Run
from cbtm_ray.train.packed_sequences import held_out_sequences

CHUNK_DOCUMENTS = 512  # read at once
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""How far a held-out loss may be from training's, which had the precision: a share of it. The evaluation's is fp32."""


@dataclass(frozen=True)
class HeldOutDocuments:
    """The held-out documents to score, in a fixed order, and which half of them is for tuning."""

    tokens: list[np.ndarray]
    text_bytes: np.ndarray
    domains: list[str | None]
    for_tuning: np.ndarray

    def token_mask(self, *, tuning: bool) -> np.ndarray:
        """Tokens of one half, bool (T,)."""
        return np.repeat(self.for_tuning == tuning, [len(tokens) for tokens in self.tokens])

    def half(
        self, logprobs_TK: np.ndarray, distances_TK: np.ndarray, ngrams_TK: np.ndarray, *, tuning: bool
    ) -> ScoredHalf:
        """The log-probabilities and distances of the tokens of one half."""
        mask_T = self.token_mask(tuning=tuning)
        return ScoredHalf(self._lengths(tuning), logprobs_TK[mask_T], distances_TK[mask_T], ngrams_TK[mask_T])

    def summarize(self, logprobs_R: np.ndarray, dense_R: np.ndarray) -> DomainSummary:
        """Perplexity and its like, over all and for each gold domain, from the log-probabilities of the reported tokens alone,
        and the dense control's."""
        text_bytes = int(self.text_bytes[~self.for_tuning].sum())
        found = perplexity.summarize(logprobs_R, self._lengths(False), text_bytes, dense_R)
        return {**found, "domain_ppl": {name: math.exp(-logprobs_R[mask].mean()) for name, mask in self.domain_masks()}}

    def domain_masks(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every gold domain of the reported documents, and which of their tokens are of it, bool (R,)."""
        domains = [domain for domain, tuning in zip(self.domains, self.for_tuning, strict=True) if not tuning]
        domain_R = np.repeat(np.array([domain or "" for domain in domains]), self._lengths(False))
        return ((name, domain_R == name) for name in sorted(set(domain_R.tolist()) - {""}))

    def _lengths(self, tuning: bool) -> np.ndarray:
        return np.array([len(t) for t, kept in zip(self.tokens, self.for_tuning == tuning, strict=True) if kept])


def held_out_documents(run: Run) -> HeldOutDocuments:
    """The `evaluate.max_documents` documents with the smallest hash of their id, in the order of the shards.

    Memory holds the ids of all held-out documents, and the tokens of these.
    """
    seed, most = run.config.run.seed, run.config.evaluate.max_documents
    filesystem, path = files.resolve(run.uri("shards", "valid"))
    dataset = ds.dataset(path, filesystem=filesystem, format="parquet")
    ids = dataset.to_table(columns=["id"], use_threads=False)["id"]
    hashes = np.array([unit_hash(seed + 1, document_id) for document_id in ids.to_pylist()])
    kept = np.sort(np.argsort(hashes, kind="stable")[:most])
    table = pa.Table.from_batches(_take_rows(filesystem, dataset.files, kept, ["tokens", "text_bytes", "domain"]))
    return HeldOutDocuments(
        tokens=[np.asarray(tokens, np.int32) for tokens in table["tokens"].to_pylist()],
        text_bytes=table["text_bytes"].to_numpy(),
        domains=table["domain"].to_pylist(),
        for_tuning=np.argsort(np.argsort(hashes[kept], kind="stable")) % 2 == 0,
    )


def _take_rows(
    filesystem: fs.FileSystem, paths: list[str], rows: np.ndarray, columns: list[str]
) -> Iterator[pa.RecordBatch]:
    """Rows by their number in all files, sorted. (`Dataset.take` can come to hold all rows: it reads ahead.)"""
    first = 0
    for path in paths:
        with filesystem.open_input_file(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(CHUNK_DOCUMENTS, columns=columns):
                here = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(batch))]
                yield batch.take(pa.array(here - first))
                first += len(batch)


def fewshot_prompts(run: Run, task: str) -> Prompts:
    """The prompts of one of `evaluate.fewshot`, of the run's own tokens."""
    return configured_prompts(task, load_tokenizer(run.uri("tokenizer")), run.config)


def logprobs_uri(run: Run, name: str, task: str | None = None) -> str:
    """Where a model's log-probabilities are kept: under another name for other weights, documents or prompts."""
    config, manifest = run.config, run.manifest(name) or {}
    scored: list[Any] = [run.identity("shards"), config.evaluate.max_documents, config.run.seed]
    if task:
        scored = [tokens.tolist() for tokens in fewshot_prompts(run, task).tokens]
    model = [manifest.get("content", manifest), manifest.get("valid_loss_nats")]  # the loss is checked with the scoring
    made_of = files.fingerprint([model, scored, config.tokens.sequence_length])
    folder = ("evaluation", "logprobs", *([f"fewshot-{task_name(task)}"] if task else []))
    return run.uri(*folder, f"{name.replace('/', '-')}-{made_of[:16]}.npy")


def check_held_out_loss(run: Run, name: str, model: PreTrainedModel, end_of_text: int) -> None:
    """Score what training measured its last held-out loss on, which the manifest has.

    The seed's is left out: it may have been trained before these shards, of the same documents in another order, were made.

    Raises:
        RuntimeError: the losses differ.
    """
    config, manifest = run.config, run.manifest(name) or {}
    if name == "seed" or manifest.get("valid_loss_nats") is None or not manifest.get("valid_tokens"):
        return
    length, seed = config.tokens.sequence_length, config.run.seed
    valid = held_out_sequences(
        run.uri("shards"), manifest["cluster"], sequence_length=length, end_of_text=end_of_text, seed=seed
    )
    assert valid is not None, "training had some, and is tied to these shards"
    sequences = torch.from_numpy(valid.batch(0, manifest["valid_tokens"] // valid.sequence_length))
    border = None if config.train.cross_documents else end_of_text
    found = perplexity.packed_loss(model, sequences, border=border, batch_tokens=config.evaluate.batch_tokens)
    known = manifest["valid_loss_nats"]
    if not abs(found - known) <= LOSS_TOLERANCE[config.train.precision] * known:
        raise RuntimeError(
            f"{run.uri(name)}: the evaluation finds a held-out loss of {found:.4f} nats a token where the end of training "
            f"found {known:.4f} on the same {manifest['valid_tokens']} tokens, so its weights or the code that reads them are "
            "not those of then. With other weights, delete the folder, and it is trained again."
        )


@ray.remote
def _score(config: Config, name: str, task: str | None) -> str:
    run = Run(config)
    uri = logprobs_uri(run, name, task)
    if not files.exists(uri):
        model = load_model(run.uri(name))
        if config.train.gpus_per_expert:
            torch.nn.Module.to(model, "cuda")
        end_of_text = load_tokenizer(run.uri("tokenizer")).eos_token_id
        if task is None:
            check_held_out_loss(run, name, model, end_of_text)
        texts = fewshot_prompts(run, task).tokens if task else held_out_documents(run).tokens
        logprobs_T = score_texts(config, model, texts, end_of_text)
        files.write_array(uri, logprobs_T)
    return uri


def score_texts(config: Config, model: PreTrainedModel, texts: list[np.ndarray], end_of_text: int) -> np.ndarray:
    """A model's log-probability of every token of texts, each alone, with the run's lengths: float32 (T,)."""
    return perplexity.score_documents(
        model,
        texts,
        sequence_length=config.tokens.sequence_length,
        end_of_text=end_of_text,
        batch_tokens=config.evaluate.batch_tokens,
    )


def score_models(run: Run, names: list[str], task: str | None = None) -> dict[str, np.ndarray]:
    """Every model's log-probability of every held-out token, float32 (T,), by its folder in the run.

    Each is loaded and run once, on a worker, and what it gave is kept in `evaluation/logprobs/`.

    Args:
        task: one of `evaluate.fewshot`, whose prompts are scored in the place of the held-out documents.
    """
    train = run.config.train
    check_fits("train.cpus_per_expert", "CPU", train.cpus_per_expert)
    check_fits("train.gpus_per_expert", "GPU", train.gpus_per_expert)
    score = _score.options(num_cpus=train.cpus_per_expert, num_gpus=train.gpus_per_expert)
    waiting = {score.remote(run.config, name, task): name for name in names}
    uris = {}
    with progress.bar(f"score models: {task_name(task)}" if task else "score models", len(names), "models") as done:
        while waiting:
            ready, _ = ray.wait(list(waiting))
            uris.update({waiting.pop(ref): uri for ref, uri in zip(ready, ray.get(ready), strict=True)})
            done(len(uris))
    return {name: files.read_array(uri) for name, uri in uris.items()}


def context_distances(
    embedder: Embedder, documents: list[np.ndarray], centers: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    """Squared distances of every token's context to each system's centers, float32 (T, K) by system."""
    parts: dict[str, list[np.ndarray]] = {system: [] for system in centers}
    for tokens in documents:
        prefixes_TD = torch.from_numpy(embedder.prefix_embeddings(tokens))
        for system, centers_KD in centers.items():
            parts[system].append(squared_distances(prefixes_TD, centers_KD).numpy())
    return {system: np.concatenate(found) for system, found in parts.items()}
