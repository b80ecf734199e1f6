"""Texts of four domains, and the embeddings of a context that grows, for the tests of embedders that read text."""

from __future__ import annotations

import numpy as np

from cbtm_ray.cluster.embed import Embedder
from tests.support.tiny import DOMAINS


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    lines = [[*domain.split(), "café", "1999", "x2,", "Re-read."] for domain in DOMAINS.values()]
    return [" ".join(random.choice(lines[n % 4], size=25)) for n in range(count)]


def contexts(embedder: Embedder, tokens: np.ndarray) -> np.ndarray:
    context, rows = embedder.context(), []
    for token in tokens:
        rows.append(context.embedding())
        context.append(int(token))
    return np.stack(rows)
