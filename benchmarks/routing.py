"""Routing: embeddings of every prefix beside re-embedding each, n-grams beside an expert: python -m benchmarks.routing

The peer is what the released code does: decode every prefix and put it through scikit-learn's tf-idf and SVD again, here
in batches and with that pipeline's own components. A second peer re-embeds every prefix from token ids with our own
`transform`, which also is the exact value to compare with. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer

from benchmarks import ngram_routing
from benchmarks.clustering import clock
from benchmarks.corpora import read_documents
from benchmarks.ngram_routing import NgramCost
from cbtm_ray.cluster.embed import TokenTfidf, decode, silent_tokens
from cbtm_ray.cluster.word_tfidf import WordTfidf, words_of
from cbtm_ray.corpus.tokenizer import encode, train_tokenizer


def best_time(work: Callable[[], np.ndarray], repeat: int) -> tuple[np.ndarray, float]:
    """The result, and the least wall seconds of `repeat` runs."""
    result, seconds, _ = min((clock(work) for _ in range(repeat)), key=lambda run: run[1])
    return result, seconds


def word_pipeline(texts: list[str], dimensions: int, seed: int) -> Pipeline:
    """The paper's embedder as a scikit-learn pipeline."""
    vectorizer = TfidfVectorizer(analyzer=words_of)
    return make_pipeline(vectorizer, TruncatedSVD(dimensions, random_state=seed), Normalizer(copy=False)).fit(texts)


def reference(embedder: TokenTfidf, tokens_T: np.ndarray) -> np.ndarray:
    """Every prefix summed anew in float64."""
    table_VD, rows = embedder.table_VD.astype(np.float64), []
    for t in range(len(tokens_T)):
        sum_D = np.bincount(tokens_T[:t], minlength=len(table_VD)) @ table_VD
        rows.append(sum_D / max(float(np.linalg.norm(sum_D)), 1e-12))
    return np.stack(rows)


def ngram_table(found: NgramCost) -> Table:
    fitted = f"{found.fit_s:.1f} s for {len(found.tables.pairs):,} pairs, {found.tables.n_bytes / 2**20:.1f} MiB"
    table = Table(f"n-grams of {ngram_routing.N_CLUSTERS} clusters ({fitted})", "us a token", "of the expert's")
    for name, us in (
        ("evidence, a token at a time", found.us_per_token),
        ("evidence of a whole document", found.us_per_document_token),
        ("an expert of 10 M parameters, a token at a time", found.expert_us_per_token),
    ):
        table.add_row(name, f"{us:,.2f}", f"{us / found.expert_us_per_token:.2%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--corpus", help="folder of JSONL with text; without it, documentation of installed packages")
    parser.add_argument("--documents", type=int, default=4000, help="documents that the embedders are fitted on")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the text whose prefixes are embedded")
    parser.add_argument("--dimensions", type=int, default=100)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    documents, _, _ = read_documents(args.corpus, args.documents, args.seed)
    texts = [document.text for document in documents]
    tokenizer = train_tokenizer(texts, args.vocabulary)
    tokens = encode(tokenizer, texts)
    text_T = np.concatenate(tokens)[: args.tokens]
    ours = TokenTfidf.fit(tokens, silent_tokens(tokenizer), dimensions=args.dimensions, random_state=args.seed)
    words = WordTfidf.fit(tokens, tokenizer, dimensions=args.dimensions, standardize=False, random_state=args.seed)
    pipeline = word_pipeline([decode(tokenizer, ids) for ids in tokens], args.dimensions, args.seed)
    prefixes = [text_T[:t] for t in range(len(text_T))]

    rows_TD, ours_s = best_time(lambda: ours.prefix_embeddings(text_T), 20)
    words_TD, words_s = best_time(lambda: words.prefix_embeddings(text_T), 3)
    _, again_s = best_time(lambda: ours.transform(prefixes), 3)
    paper_TD, paper_s = best_time(lambda: pipeline.transform([decode(tokenizer, p) for p in prefixes]), 1)
    error = float(np.abs(rows_TD - reference(ours, text_T)).max())
    word_error = float(np.abs(words_TD - paper_TD).max())

    table = Table("embedding of every prefix", "time, ms", "us a token", "largest error")
    for name, seconds, wrong in (
        ("TokenTfidf.prefix_embeddings", ours_s, f"{error:.1e}"),
        ("TokenTfidf.transform of every prefix", again_s, ""),
        ("WordTfidf.prefix_embeddings", words_s, f"{word_error:.1e}"),
        ("decode, scikit-learn tf-idf and SVD of every prefix", paper_s, ""),
    ):
        table.add_row(name, f"{1000 * seconds:,.2f}", f"{1e6 * seconds / len(text_T):,.1f}", wrong)
    console = Console()
    console.print(f"{len(text_T)} tokens, V = {len(tokenizer)}, D = {args.dimensions}, 1 thread, seed {args.seed}")
    console.print(table)
    ngrams = ngram_routing.measure(tokens, ours.transform(tokens), len(tokenizer), text_T)
    console.print(ngram_table(ngrams))
    print(
        json.dumps(
            {
                "prefix_speedup": round(paper_s / ours_s, 1),
                "max_abs_error": max(error, ngrams.step_error),
                "speedup_over_own_transform": round(again_s / ours_s, 1),
                "word_prefix_speedup": round(paper_s / words_s, 1),
                "word_max_abs_error": word_error,
                "ngram_us_per_token": round(ngrams.us_per_token, 2),
                "ngram_share_of_forward": round(ngrams.us_per_token / ngrams.expert_us_per_token, 5),
                "ngram_table_error_nats": round(ngrams.table_error, 5),
                "table_mib": round(ngrams.tables.n_bytes / 2**20, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
