"""An embedding by a sentence encoder, which reads text: token ids are decoded for it.

N documents, T tokens, D embedding dimensions.
"""

from __future__ import annotations

import math
import tempfile
from functools import partial
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from cbtm_ray import files
from cbtm_ray.cluster.embed import TextContext, decode, is_read_at
from cbtm_ray.config import EmbedConfig
from cbtm_ray.errors import UserError
from cbtm_ray.models import most_positions

_HOW: dict[str, Any] = {"normalize_embeddings": True, "show_progress_bar": False}


def load_encoder(config: EmbedConfig) -> SentenceTransformer:
    """The encoder of `embed.encoder`, a folder, URI or name, tried on a short text and on one of `embed.encoder_tokens`.

    Raises:
        UserError: there is none, or it cannot read such texts beside each other.
        OSError: its store cannot be reached.
    """
    assert config.encoder is not None
    field = f"embed.encoder={config.encoder!r}"
    with files.loading(config.encoder, f"{field} cannot be loaded") as found:
        model = SentenceTransformer(found)
    limits = [model.max_seq_length, model.transformers_model and most_positions(model.transformers_model)]
    if config.encoder_tokens > (most := min((limit for limit in limits if limit), default=math.inf)):
        raise UserError(
            f"embed.encoder_tokens={config.encoder_tokens} must be at most {most}, the most that {field} reads. Lower it."
        )
    if config.encoder_tokens <= (around := model.tokenizer.num_special_tokens_to_add()):
        raise UserError(
            f"embed.encoder_tokens={config.encoder_tokens} must be above {around}, the tokens that {field} puts around one. "
            "Raise it."
        )
    if model.tokenizer.pad_token_id is None:
        raise UserError(
            f"{field} has no padding token, which texts of different lengths need. Name one as pad_token in the "
            "tokenizer_config.json of its folder, such as its end-of-text token."
        )
    _try_encoder(model, config)
    return model


def _try_encoder(model: SentenceTransformer, config: EmbedConfig) -> None:
    model.max_seq_length = config.encoder_tokens
    try:
        [alone_D] = model.encode(["word"], **_HOW)
        beside_D, _ = model.encode(["word", "word " * config.encoder_tokens], **_HOW)
    except (IndexError, RuntimeError, ValueError) as error:
        raise UserError(
            f"embed.encoder={config.encoder!r} cannot embed texts of embed.encoder_tokens={config.encoder_tokens} tokens: "
            f"{str(error).splitlines()[0]} Lower it, or take another encoder."
        ) from error
    if not np.allclose(alone_D, beside_D, atol=1e-3):
        raise UserError(
            f"embed.encoder={config.encoder!r} embeds a text otherwise beside a longer one: it pools the padding too. Take "
            "another encoder, or correct its padding side or pooling."
        )


class SentenceEncoder:
    """A sentence-transformers model, or a Hugging Face encoder whose states are then averaged; rows are L2-normalized.

    The model's own folder says how it pools, which prompt it wants and how it normalizes. Of a document it reads the first
    `encoder_tokens` of its own tokens, of a context the last ones.
    """

    def __init__(self, model: SentenceTransformer, config: EmbedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """`tokenizer` made the token ids that are embedded; the model has its own."""
        model.max_seq_length = config.encoder_tokens
        self._model, self._config, self._tokenizer = model, config, tokenizer

    @classmethod
    def open(cls, config: EmbedConfig, tokenizer: PreTrainedTokenizerBase) -> SentenceEncoder:
        """The encoder of `embed.encoder`; errors as of `load_encoder`."""
        return cls(load_encoder(config), config, tokenizer)

    @classmethod
    def load(cls, folder_uri: str, config: EmbedConfig, tokenizer: PreTrainedTokenizerBase) -> SentenceEncoder:
        with files.local_folder(folder_uri) as folder:
            return cls(SentenceTransformer(folder), config, tokenizer)

    def save(self, folder_uri: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._model.save_pretrained(folder, create_model_card=False)
            files.publish_folder(folder, folder_uri)

    def transform(self, documents: list[np.ndarray]) -> np.ndarray:
        """Embeddings of whole documents, float32 (N, D)."""
        return self._encode(documents, "right")

    def prefix_embeddings(self, tokens_T: np.ndarray) -> np.ndarray:
        """Embedding of the context of every token, float32 (T, D), as `TextContext` gives it: read anew at some of them."""
        lengths_T = np.arange(len(tokens_T))
        read = [n for n in lengths_T if is_read_at(int(n), self._config.refresh_tokens)]
        rows_RD = self._encode([tokens_T[:n] for n in read], "left")
        return rows_RD[np.searchsorted(read, lengths_T, side="right") - 1]

    def context(self) -> TextContext:
        embed = partial(self._encode, truncation_side="left")
        return TextContext(embed, refresh_tokens=self._config.refresh_tokens)

    def _encode(self, documents: list[np.ndarray], truncation_side: str) -> np.ndarray:
        """An empty text is the zero vector, which is no nearer to any topic."""
        texts = [decode(self._tokenizer, document) for document in documents]
        read = [n for n, text in enumerate(texts) if text.strip()]
        rows_ND = np.zeros((len(texts), self._model.get_embedding_dimension() or 0), np.float32)
        if read:
            self._model.tokenizer.truncation_side = truncation_side
            rows_ND[read] = self._model.encode(
                [texts[n] for n in read],
                batch_size=self._config.batch_documents,
                **_HOW,
            )
        return rows_ND
