"""Picks the expert of a text, with numpy and transformers alone: python load_router.py "TEXT"

The score of expert j is beta * sum_s gamma^(T-1-s) e_j(x_s) - ||h - c_j||^2 / temperature. e_j is the evidence of a token by
the cluster's bigram model: how much likelier the token is after the one before it than in the whole corpus. h is the
normalized sum of the tokens' rows, c_j the cluster's center. Terms that router.json does not have are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Router:
    """The files of a folder `router/`. K experts, T tokens."""

    def __init__(self, folder: str | Path) -> None:
        self.settings = json.loads((Path(folder) / "router.json").read_text())
        self.arrays = dict(np.load(Path(folder) / "router.npz"))

    def scores(self, token_ids: list[int]) -> np.ndarray:
        """Log weights of the experts for the token after these, (K,). Without special tokens; may be empty."""
        tokens_T = np.asarray(token_ids, np.int64)
        return np.asarray(self._evidence(tokens_T) - self._distances(tokens_T))

    def expert(self, token_ids: list[int]) -> int:
        """The expert of most weight."""
        return int(self.scores(token_ids).argmax())

    def _evidence(self, tokens_T: np.ndarray) -> np.ndarray:
        if "beta" not in self.settings or not len(tokens_T):
            return np.zeros(self.settings["experts"])
        tables, vocabulary = self.arrays, len(self.arrays["token_VK"])
        previous_T = np.concatenate([[self.settings["end_of_text"]], tokens_T[:-1]])
        keys_T = previous_T * vocabulary + tokens_T
        rows_TK = tables["token_VK"][tokens_T].astype(np.float32)
        if len(tables["pairs"]):
            places_T = np.minimum(np.searchsorted(tables["pairs"], keys_T), len(tables["pairs"]) - 1)
            kept_T = tables["pairs"][places_T] == keys_T
            rows_TK[kept_T] = tables["pair_PK"][places_T[kept_T]]
        rows_TK -= tables["context_VK"][previous_T]
        ages_T = np.arange(len(tokens_T) - 1, -1, -1)
        return np.asarray(self.settings["beta"] * (self.settings["gamma"] ** ages_T @ rows_TK))

    def _distances(self, tokens_T: np.ndarray) -> np.ndarray | float:
        if "temperature" not in self.settings:
            return 0.0
        sum_D = self.arrays["table_VD"][tokens_T].astype(np.float64).sum(axis=0)
        context_D = sum_D / max(np.linalg.norm(sum_D), 1e-12)
        squared_K = np.square(context_D - self.arrays["centers_KD"]).sum(axis=1)
        return np.asarray(
            (squared_K**2 if self.settings.get("legacy_d4") else squared_K) / self.settings["temperature"]
        )


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    here, text = Path(__file__).parent, sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(here / "experts" / "cluster=0000")
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    expert = Router(here / "router").expert(token_ids)
    model: Any = AutoModelForCausalLM.from_pretrained(here / "experts" / f"cluster={expert:04d}")
    inputs = tokenizer(tokenizer.eos_token + text, add_special_tokens=False, return_tensors="pt")
    answer = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=40)
    print(f"expert {expert}: {tokenizer.decode(answer[0, 1:])}")


if __name__ == "__main__":
    main()
