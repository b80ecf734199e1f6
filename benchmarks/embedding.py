"""Embedding a corpus, ours beside scikit-learn's pipeline: python -m benchmarks.embedding [--corpus FOLDER]

Throughput of each step on one core, in MB of text a second: read, tokenize, embed, assign; and the paper's pipeline of
scikit-learn (tf-idf over words, SVD, L2 norm) from the same texts. `sklearn_speedup_per_core` compares from text to
embedding, so ours with tokenizing, which training needs in any case. Where the corpus has domains, a second table tells
how well the clusters of each embedder agree with them. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from benchmarks.clustering import clock
from benchmarks.corpora import read_documents
from benchmarks.routing import word_pipeline
from cbtm_ray.cluster.describe import agreement
from cbtm_ray.cluster.embed import Embedder, TokenTfidf, fit_embedder, silent_tokens
from cbtm_ray.cluster.kmeans import BalancedKMeans
from cbtm_ray.cluster.shard_steps import squared_distances
from cbtm_ray.cluster.word_tfidf import words_of
from cbtm_ray.config import EmbedConfig
from cbtm_ray.corpus.tokenizer import encode, train_tokenizer

CENTERS = 64


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    result, seconds, _ = clock(work)
    return result, seconds


def throughput(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, read_mb_per_s: float, args: argparse.Namespace
) -> tuple[Table, dict[str, float]]:
    """Seconds of every step on texts that nothing was fitted on."""
    half = len(texts) // 2
    seen, fresh = texts[:half], texts[half:]
    mb = sum(len(text.encode()) for text in fresh) / 1e6
    silent = silent_tokens(tokenizer)
    ours = TokenTfidf.fit(encode(tokenizer, seen), silent, dimensions=args.dimensions, random_state=args.seed)
    peer = word_pipeline(seen, args.dimensions, args.seed)
    tokens, tokenize_s = timed(lambda: encode(tokenizer, fresh))
    embeddings_ND, embed_s = timed(lambda: torch.from_numpy(ours.transform(tokens)))
    _, assign_s = timed(lambda: squared_distances(embeddings_ND, embeddings_ND[:CENTERS]).argmin(1))
    _, words_s = timed(lambda: [words_of(text) for text in fresh])
    _, peer_s = timed(lambda: peer.transform(fresh))
    table = Table("step, one core", "MB/s", title=f"{len(fresh):,} documents, {mb:.1f} MB")
    table.add_row("read", f"{read_mb_per_s:,.1f}")
    for name, seconds in (
        ("tokenize", tokenize_s),
        ("embed token ids", embed_s),
        (f"nearest of {CENTERS} centers", assign_s),
        ("scikit-learn's pipeline, from text", peer_s),
        ("  of which splitting into words", words_s),
    ):
        table.add_row(name, f"{mb / seconds:,.1f}")
    whole_s = mb / read_mb_per_s + tokenize_s + embed_s + assign_s
    return table, {
        "sklearn_speedup_per_core": round(peer_s / (tokenize_s + embed_s), 2),
        "mb_per_s": round(mb / whole_s, 2),
        "embed_only_speedup": round(peer_s / embed_s, 1),
    }


def embedders(
    tokens: list[np.ndarray], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> dict[str, Embedder]:
    configs = {
        "TokenTfidf": EmbedConfig(dimensions=args.dimensions),
        "WordTfidf, L2": EmbedConfig(embedder="word_tfidf", dimensions=args.dimensions),
        "WordTfidf, standardized": EmbedConfig(
            embedder="word_tfidf", normalisation="standard", dimensions=args.dimensions
        ),
    }
    if args.encoder:
        configs["SentenceEncoder"] = EmbedConfig(embedder="sentence", encoder=args.encoder)
    return {name: fit_embedder(config, tokenizer, tokens, args.seed) for name, config in configs.items()}


def agreements(
    tokens: list[np.ndarray], domains: list[str | None], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> tuple[Table, list[dict[str, Any]]]:
    """NMI and purity against the gold domains, with every document at its nearest center."""
    table = Table("embedder", "K", "balanced", "NMI", "purity", "largest / mean", "embed, s", "fit, s")
    rows = []
    for name, embedder in embedders(tokens, tokenizer, args).items():
        points_ND, embed_s = timed(partial(embedder.transform, tokens))
        for n_clusters in args.k:
            for balanced in (True, False):
                model = BalancedKMeans(n_clusters, balanced=balanced, random_state=args.seed)
                _, fit_s = timed(partial(model.fit, points_ND))
                labels_N = model.predict(points_ND)
                skew = np.bincount(labels_N, minlength=n_clusters).max() / (len(labels_N) / n_clusters)
                row = {"embedder": name, "k": n_clusters, "balanced": balanced, **agreement(labels_N, domains)}
                rows.append(row)
                table.add_row(
                    name, str(n_clusters), "yes" if balanced else "no", f"{row['nmi']:.3f}", f"{row['purity']:.3f}",
                    f"{skew:.2f}", f"{embed_s:.1f}", f"{fit_s:.1f}",
                )  # fmt: skip
    return table, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--corpus", help="folder of JSONL with text and domain; else documentation of installed packages"
    )
    parser.add_argument("--documents", type=int, default=20_000, help="documents drawn from the corpus")
    parser.add_argument("--dimensions", type=int, default=100)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument(
        "--k", type=int, nargs="*", default=[8, 16, 20], help="clusters; none leaves the second table out"
    )
    parser.add_argument("--encoder", help="folder or name of a sentence encoder to include")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    console = Console()
    documents, read_s, read_bytes = read_documents(args.corpus, args.documents, args.seed)
    texts = [document.text for document in documents]
    tokenizer = train_tokenizer(texts[: len(texts) // 2], args.vocabulary)
    table, result = throughput(texts, tokenizer, read_bytes / 1e6 / read_s, args)
    console.print(table)
    if args.k:
        table, _ = agreements(encode(tokenizer, texts), [document.domain for document in documents], tokenizer, args)
        console.print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
