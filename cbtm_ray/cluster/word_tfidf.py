"""The paper's embedding: tf-idf over words. It takes token ids, as every embedder, and decodes them.

N documents, T tokens, W words, D embedding dimensions.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer
from sklearn.preprocessing import normalize
from transformers import PreTrainedTokenizerBase

from cbtm_ray import files
from cbtm_ray.cluster.embed import TextContext, decode
from cbtm_ray.errors import UserError

_WORD = re.compile(r"\b\w\w+\b")
_PREFIX_ROWS = 1024  # contexts whose word counts are dense in memory at once


def words_of(text: str) -> list[str]:
    """The words that carry topic, in lower case: no stop word, and no number, which the paper's code folds into one
    (`#NUMBER`) and then stops (any word that begins with a digit)."""
    found = _WORD.findall(text.lower())
    return [word for word in found if word not in ENGLISH_STOP_WORDS and not word[0].isdigit()]


class WordTfidf:
    """The paper's embedding (section 3.2): scikit-learn's tf-idf over words, and a truncated SVD.

    Rows are L2-normalized as in the released code, or standardized by dimension as in the paper's text.
    """

    def __init__(
        self,
        words: list[str],
        idf_W: np.ndarray,
        components_WD: np.ndarray,
        scaling_2D: np.ndarray | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """`scaling_2D`: mean and standard deviation of each dimension; None for L2-normalized rows."""
        self.words, self.idf_W, self.components_WD, self.scaling_2D = words, idf_W, components_WD, scaling_2D
        self._tokenizer = tokenizer
        self._column = {word: column for column, word in enumerate(words)}

    @classmethod
    def fit(
        cls,
        documents: list[np.ndarray],
        tokenizer: PreTrainedTokenizerBase,
        *,
        dimensions: int,
        standardize: bool,
        random_state: int,
    ) -> WordTfidf:
        """Fit on the token ids of a sample. UserError if it has too few documents or different words."""
        counter = CountVectorizer(analyzer=words_of)
        texts = [decode(tokenizer, document) for document in documents]
        counts_NW = counter.fit_transform(texts) if any(map(words_of, texts)) else csr_matrix((len(texts), 1))
        bound = min(len(documents), counts_NW.shape[1] - 1)
        if dimensions > bound:
            raise UserError(
                f"embed.dimensions={dimensions} must be at most {bound}, what the corpus sample has of documents and of "
                "different words. Lower it or give more documents."
            )
        frequency_W = np.bincount(counts_NW.indices, minlength=counts_NW.shape[1])
        idf_W = np.log((1 + len(documents)) / (1 + frequency_W)) + 1
        tfidf_NW = normalize(counts_NW.multiply(idf_W).tocsr())
        svd = TruncatedSVD(n_components=dimensions, random_state=random_state)
        projected_ND = svd.fit_transform(tfidf_NW)
        scaling_2D = np.stack([projected_ND.mean(0), projected_ND.std(0)]) if standardize else None
        return cls(list(counter.get_feature_names_out()), idf_W, svd.components_.T.copy(), scaling_2D, tokenizer)

    def transform(self, documents: list[np.ndarray]) -> np.ndarray:
        """Embeddings of whole documents, float32 (N, D)."""
        columns = [self._columns(decode(self._tokenizer, document)) for document in documents]
        used = np.arange(len(self.words))
        return self._embed(_counts(columns, used), used)

    def prefix_embeddings(self, tokens_T: np.ndarray) -> np.ndarray:
        """Embedding of the context of every token, exact; float32 (T, D).

        A token that begins with white space ends the words before it, so only what follows the last such token is
        decoded and read again for each one.
        """
        settled: list[list[int]] = [[]]  # words that end before this row's context does; they stay for all later rows
        unsettled: list[list[int]] = [[]]  # words that this row's context ends with
        start = 0
        for end in range(1, len(tokens_T)):
            settled.append([])
            if decode(self._tokenizer, tokens_T[end - 1 : end])[:1].isspace():
                settled[-1] = self._columns(decode(self._tokenizer, tokens_T[start : end - 1]))
                start = end - 1
            unsettled.append(self._columns(decode(self._tokenizer, tokens_T[start:end])))
        used = np.unique([0, *(column for row in (*settled, *unsettled) for column in row)])
        before_U, blocks = np.zeros((1, len(used))), []
        for first in range(0, len(settled), _PREFIX_ROWS):
            rows = slice(first, first + _PREFIX_ROWS)
            sums_TU = before_U + np.cumsum(_counts(settled[rows], used).toarray(), axis=0)
            before_U = sums_TU[-1:]
            blocks.append(self._embed(csr_matrix(sums_TU) + _counts(unsettled[rows], used), used))
        return np.concatenate(blocks)[: len(tokens_T)]

    def context(self) -> TextContext:
        return TextContext(self.transform, refresh_tokens=1)

    def save(self, folder_uri: str) -> None:
        files.write_json(files.join(folder_uri, "words.json"), self.words)
        arrays = {"idf": self.idf_W, "components": self.components_WD, "scaling": self.scaling_2D}
        for name, array in arrays.items():
            if array is not None:
                files.write_array(files.join(folder_uri, f"{name}.npy"), array)

    @classmethod
    def load(cls, folder_uri: str, tokenizer: PreTrainedTokenizerBase) -> WordTfidf:
        idf_W, components_WD = (files.read_array(files.join(folder_uri, f"{n}.npy")) for n in ("idf", "components"))
        scaling_uri = files.join(folder_uri, "scaling.npy")
        scaling_2D = files.read_array(scaling_uri) if files.exists(scaling_uri) else None
        return cls(files.read_json(files.join(folder_uri, "words.json")), idf_W, components_WD, scaling_2D, tokenizer)

    def _columns(self, text: str) -> list[int]:
        """The columns of the known words of a text, as often as they stand there."""
        return [self._column[word] for word in words_of(text) if word in self._column]

    def _embed(self, counts_NU: csr_matrix, used_U: np.ndarray) -> np.ndarray:
        """Embeddings from counts of the words in the columns `used_U`."""
        if not counts_NU.shape[0]:
            return np.zeros((0, self.components_WD.shape[1]), np.float32)
        tfidf_NU = normalize(counts_NU.multiply(self.idf_W[used_U]).tocsr())
        projected_ND = tfidf_NU @ self.components_WD[used_U]
        if self.scaling_2D is None:
            return normalize(projected_ND).astype(np.float32)
        return ((projected_ND - self.scaling_2D[0]) / self.scaling_2D[1]).astype(np.float32)


def _counts(columns: list[list[int]], used_U: np.ndarray) -> csr_matrix:
    """Counts, float64 sparse (N, U), of columns that all are in the sorted `used_U`."""
    indptr = np.cumsum([0, *map(len, columns)])
    indices = np.searchsorted(used_U, np.fromiter(itertools.chain.from_iterable(columns), np.int64, int(indptr[-1])))
    counts_NU = csr_matrix((np.ones(len(indices)), indices, indptr), shape=(len(columns), len(used_U)))
    counts_NU.sum_duplicates()
    return counts_NU
