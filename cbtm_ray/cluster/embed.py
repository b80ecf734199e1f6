"""Embedders: documents and contexts, as token ids, -> points that clustering and routing measure distances between.

N documents, T tokens, V vocabulary, D embedding dimensions.

All share one interface, over token ids, since those are what training, evaluation and serving have at hand:

    transform(documents) -> (N, D)      prefix_embeddings(tokens_T) -> (T, D)      context()      save(folder_uri)

`TokenTfidf` is the default. tf-idf followed by a truncated SVD is linear in the term counts, up to the final L2 norm. With
the V x D table E[v] = idf[v] * components[:, v], the embedding of any text is normalize(sum of E[t] over its tokens t):
tf-idf's own norm cancels, and routing costs one row addition a token. The paper (section 3.2) embeds words: `WordTfidf`.

scikit-learn and the embedders of text are imported where they are used: a worker that has a table to look up would spend
more CPU time on importing them than on its documents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse import csr_matrix
from transformers import PreTrainedTokenizerBase

from cbtm_ray import files
from cbtm_ray.config import EXECUTION_FIELDS, EmbedConfig
from cbtm_ray.corpus.tokenizer import vocabulary_size
from cbtm_ray.errors import UserError


class Context(Protocol):
    """The embedding of a text that grows by a token at a time."""

    def append(self, token: int) -> None: ...

    def embedding(self) -> np.ndarray:
        """Float32 (D,): the row that `prefix_embeddings` gives for the next token."""


class Embedder(Protocol):
    """Embeds documents, prefixes of a document, and a growing context."""

    def transform(self, documents: list[np.ndarray]) -> np.ndarray:
        """Embeddings of whole documents, float32 (N, D)."""

    def prefix_embeddings(self, tokens_T: np.ndarray) -> np.ndarray:
        """Embedding of the context of every token, float32 (T, D): row t is that of tokens[:t]."""

    def context(self) -> Context: ...

    def save(self, folder_uri: str) -> None: ...


class TokenTfidf:
    """tf-idf over token ids with a truncated SVD.

    Attributes:
        table_VD: float32; the rows of tokens that carry no topic (stop words, digits, punctuation) are zero.
    """

    def __init__(self, table_VD: np.ndarray) -> None:
        self.table_VD = np.ascontiguousarray(table_VD, dtype=np.float32)

    @classmethod
    def fit(
        cls, documents: list[np.ndarray], silent_V: np.ndarray, *, dimensions: int, random_state: int
    ) -> TokenTfidf:
        """Fit on token ids.

        Args:
            documents: token ids of each document.
            silent_V: bool, tokens to leave out (see `silent_tokens`).
            dimensions: D, less than the number of other tokens and at most the number of documents.
        """
        counts_NV = _count(documents, len(silent_V))
        counts_NV.data[silent_V[counts_NV.indices]] = 0
        counts_NV.eliminate_zeros()
        document_frequency_V = np.bincount(counts_NV.indices, minlength=len(silent_V))
        bound = min(len(documents), int((document_frequency_V > 0).sum()) - 1)
        if dimensions > bound:
            raise UserError(
                f"embed.dimensions={dimensions} must be at most {bound}, what the corpus sample has of documents and of "
                "different tokens. Lower it or give more documents."
            )
        from sklearn.decomposition import TruncatedSVD
        from sklearn.preprocessing import normalize

        idf_V = np.log((1 + len(documents)) / (1 + document_frequency_V)) + 1
        tfidf_NV = normalize(counts_NV.multiply(idf_V).tocsr())
        svd = TruncatedSVD(n_components=dimensions, random_state=random_state).fit(tfidf_NV)
        return cls(np.where(silent_V[:, None], 0, idf_V[:, None] * svd.components_.T))

    def transform(self, documents: list[np.ndarray]) -> np.ndarray:
        """Embeddings of whole documents: float32 (N, D), unit rows; zero where no token carries a topic."""
        if not documents:
            return np.zeros((0, self.table_VD.shape[1]), np.float32)
        offsets = np.cumsum([0, *(len(document) for document in documents[:-1])])
        sums_ND = torch.nn.functional.embedding_bag(
            torch.from_numpy(np.concatenate(documents).astype(np.int64)),
            torch.from_numpy(self.table_VD),
            torch.from_numpy(offsets.astype(np.int64)),
            mode="sum",
        )
        return torch.nn.functional.normalize(sums_ND, dim=1).numpy()

    def prefix_embeddings(self, tokens_T: np.ndarray) -> np.ndarray:
        """Embedding of the context of every token: row t is that of tokens[:t], so row 0 is zero. float32 (T, D).

        Exact, in O(T D); summed in float64, so that the last row of a long text is as good as its first.
        """
        rows_TD = torch.from_numpy(self.table_VD.take(tokens_T[:-1], axis=0))
        sums_TD = torch.cumsum(rows_TD, dim=0, dtype=torch.float64)  # a third of numpy's time
        prefixes_TD = np.zeros((len(tokens_T), self.table_VD.shape[1]), np.float32)
        prefixes_TD[1:] = torch.nn.functional.normalize(sums_TD, dim=1).numpy()
        return prefixes_TD

    def context(self) -> TokenContext:
        return TokenContext(self.table_VD)

    def save(self, folder_uri: str) -> None:
        files.write_array(files.join(folder_uri, "table.npy"), self.table_VD)

    @classmethod
    def load(cls, folder_uri: str) -> TokenTfidf:
        return cls(files.read_array(files.join(folder_uri, "table.npy")))


class TokenContext:
    """A running sum of table rows: O(D) a token."""

    def __init__(self, table_VD: np.ndarray) -> None:
        self._table_VD, self._sum_D = table_VD, np.zeros(table_VD.shape[1])

    def append(self, token: int) -> None:
        self._sum_D += self._table_VD[token]

    def embedding(self) -> np.ndarray:
        norm = math.sqrt(self._sum_D @ self._sum_D)  # np.linalg.norm takes longer to begin than this takes
        return (self._sum_D / max(norm, 1e-12)).astype(np.float32)


class TextContext:
    """The embedding of a text that grows by a token at a time, read anew at every `refresh_tokens`-th token."""

    def __init__(self, embed: Callable[[list[np.ndarray]], np.ndarray], *, refresh_tokens: int) -> None:
        self._embed, self._refresh_tokens = embed, refresh_tokens
        self._tokens: list[int] = []
        self._embedding_D = embed([np.zeros(0, np.int32)])[0]

    def append(self, token: int) -> None:
        self._tokens.append(token)
        if is_read_at(len(self._tokens), self._refresh_tokens):
            self._embedding_D = self._embed([np.array(self._tokens, np.int32)])[0]

    def embedding(self) -> np.ndarray:
        return self._embedding_D


def is_read_at(length: int, refresh_tokens: int) -> bool:
    """Multiples of `refresh_tokens`, and powers of two below: short contexts change fastest."""
    return length % refresh_tokens == 0 or (length < refresh_tokens and length & (length - 1) == 0)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def fit_embedder(
    config: EmbedConfig, tokenizer: PreTrainedTokenizerBase, documents: list[np.ndarray], random_state: int
) -> Embedder:
    """The embedder that the configuration names, fitted on the token ids of a sample."""
    if config.embedder == "token_tfidf":
        return TokenTfidf.fit(
            documents, silent_tokens(tokenizer), dimensions=config.dimensions, random_state=random_state
        )
    if config.embedder == "sentence":
        from cbtm_ray.cluster.sentence_encoder import SentenceEncoder

        return SentenceEncoder.open(config, tokenizer)
    from cbtm_ray.cluster.word_tfidf import WordTfidf

    return WordTfidf.fit(
        documents,
        tokenizer,
        dimensions=config.dimensions,
        standardize=config.normalisation == "standard",
        random_state=random_state,
    )


def save_embedder(embedder: Embedder, config: EmbedConfig, folder_uri: str) -> None:
    """Arrays, JSON and safetensors, and last the settings that `load_embedder` goes by."""
    embedder.save(folder_uri)
    files.write_json(files.join(folder_uri, "embedder.json"), _without_execution(dataclasses.asdict(config)))


def saved_settings(folder_uri: str) -> dict[str, Any]:
    """The settings that an embedder was saved with; older folders have execution fields among them, which are left out."""
    return _without_execution(files.read_json(files.join(folder_uri, "embedder.json")))


def _without_execution(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if f"embed.{name}" not in EXECUTION_FIELDS}


def load_embedder(
    folder_uri: str, tokenizer: PreTrainedTokenizerBase, batch_documents: int = EmbedConfig.batch_documents
) -> Embedder:
    """The embedder that `save_embedder` left in a folder; an encoder reads `batch_documents` at once."""
    config = EmbedConfig(**saved_settings(folder_uri), batch_documents=batch_documents)
    if config.embedder == "token_tfidf":
        return TokenTfidf.load(folder_uri)
    if config.embedder == "sentence":
        from cbtm_ray.cluster.sentence_encoder import SentenceEncoder

        return SentenceEncoder.load(folder_uri, config, tokenizer)
    from cbtm_ray.cluster.word_tfidf import WordTfidf

    return WordTfidf.load(folder_uri, tokenizer)


def load_clusterer(
    folder_uri: str, tokenizer: PreTrainedTokenizerBase, batch_documents: int = EmbedConfig.batch_documents
) -> tuple[Embedder, torch.Tensor]:
    """The embedder and the cluster centers, float32 (K, D), of a finished `clusterer/`."""
    return load_embedder(files.join(folder_uri, "embedder"), tokenizer, batch_documents), load_centers(folder_uri)


def load_centers(folder_uri: str) -> torch.Tensor:
    """The cluster centers in a folder, float32 (K, D): the clusterer's, or a control's."""
    return torch.from_numpy(files.read_array(files.join(folder_uri, "centers.npy")))


def silent_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokens that say nothing of the topic: English stop words, and all without a letter; ids without a token. Bool (V,)."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    silent_V = np.ones(vocabulary_size(tokenizer), bool)
    for token in tokenizer.get_vocab().values():
        word = str(tokenizer.decode([token])).strip().lower()
        silent_V[token] = word in ENGLISH_STOP_WORDS or not any(c.isalpha() for c in word)
    return silent_V


def _count(documents: list[np.ndarray], vocabulary_size: int) -> csr_matrix:
    """Token counts, float64 sparse (N, V)."""
    rows = [np.unique(document, return_counts=True) for document in documents]
    indptr = np.cumsum([0, *(len(tokens) for tokens, _ in rows)])
    indices = np.concatenate([tokens for tokens, _ in rows])
    data = np.concatenate([counts for _, counts in rows]).astype(np.float64)
    return csr_matrix((data, indices, indptr), shape=(len(documents), vocabulary_size))
