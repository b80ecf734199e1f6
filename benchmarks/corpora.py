"""Text for the benchmarks: documents of a corpus folder, or of packages that every installation has."""

from __future__ import annotations

import itertools
import time

import numpy as np

from cbtm_ray.config import CorpusConfig
from cbtm_ray.corpus.documents import Document, read_shard
from cbtm_ray.corpus.installed_docs import package_documents
from cbtm_ray.corpus.shards import list_shards

PACKAGES = ("numpy", "scipy", "pandas", "sklearn", "torch", "sympy")
PACKAGE_BYTES = 4_000_000


def read_documents(corpus: str | None, count: int, seed: int) -> tuple[list[Document], float, int]:
    """A seeded sample of at most `count` documents, and the seconds and bytes of reading all that it was drawn from."""
    started = time.perf_counter()
    if corpus:
        config = CorpusConfig(paths=(corpus,), domain_column="domain")
        documents = list(itertools.chain.from_iterable(read_shard(shard, config) for shard in list_shards((corpus,))))
    else:
        documents = [document for package in PACKAGES for document in package_documents(package, PACKAGE_BYTES)]
    seconds = time.perf_counter() - started
    read_bytes = sum(len(document.text.encode()) for document in documents)
    chosen = np.random.default_rng(seed).permutation(len(documents))[:count]
    return [documents[i] for i in chosen], seconds, read_bytes
