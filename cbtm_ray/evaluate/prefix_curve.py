"""How much of a text routing has to see: the ratio to the dense control over the length of the prefix that it has seen.

For each length n the documents that are longer count, with their tokens after the first n. So the figures of one length
are of the same tokens, and those of two lengths are not. Routing is held there: the weights for the token after the prefix
stay for all that follow. Beside it, routing that goes on, and the best single expert for these tokens in hindsight.

T tokens (of one document after the other), K experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cbtm_ray.evaluate.perplexity import document_draws, document_sums, oracle_logprobs, summarize
from cbtm_ray.evaluate.result_rows import ORACLE, GainShare, PrefixRow
from cbtm_ray.merge.mixture import mix_logprobs
from cbtm_ray.merge.rereading import positions
from cbtm_ray.merge.routers import Route
from cbtm_ray.merge.scores import ScoredHalf

GAIN_TOKENS = 32
"""The length of the prefix whose share of the gain the report names."""


def prefix_rows(
    held_out: ScoredHalf, dense_T: np.ndarray, routes: Sequence[Route], lengths: Sequence[int]
) -> list[PrefixRow]:
    """A row for each length, route and way (held, going on), and one for the oracle; none where no document is longer."""
    weights = [route.weights(held_out) for route in routes]
    rows: list[PrefixRow] = []
    for n in lengths:
        after_T = positions(held_out.lengths) >= n
        if not after_T.any():
            continue
        rest = ScoredHalf(
            held_out.lengths[held_out.lengths > n] - n,
            held_out.logprobs_TK[after_T],
            held_out.squared_distances_TK[after_T],
        )
        mixed = {(ORACLE, 1, False): oracle_logprobs(rest)}
        for route, weights_TK in zip(routes, weights, strict=True):
            held_TK = hold(weights_TK, held_out.lengths, n)
            for is_held, kept_TK in ((True, held_TK), (False, weights_TK)):
                mixed[route.routing, route.top_k, is_held] = mix_logprobs(rest.logprobs_TK, kept_TK[after_T])
        found = {key: _row(n, key, mixed_T, rest.lengths, dense_T[after_T]) for key, mixed_T in mixed.items()}
        paper, held, full = ("embedding", 1, False), ("ngram", 1, True), ("ngram", 1, False)
        if {paper, held, full} <= mixed.keys():
            gain = gain_share(mixed[paper], mixed[held], mixed[full], rest.lengths)
            if gain:
                found[held]["gain"] = gain
        rows += found.values()
    return rows


def hold(weights_TK: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray:
    """Weights that stay from the one for the token after the first `n` on, in every document; (T, K)."""
    rows_T = np.arange(len(weights_TK)) - np.maximum(positions(lengths) - n, 0)
    return weights_TK[rows_T]


def gain_share(paper_T: np.ndarray, held_T: np.ndarray, full_T: np.ndarray, lengths: np.ndarray) -> GainShare | None:
    """The share of a gain over the paper's routing that is left where routing is held; None where there is no gain.

    Args:
        paper_T: log-probabilities of the tokens by the paper's routing.
        held_T: of the same tokens by another routing that is held.
        full_T: by that routing, going on.
        lengths: tokens of each document.
    """
    left_N, all_N = (document_sums(logprobs_T - paper_T, lengths) for logprobs_T in (held_T, full_T))
    if all_N.sum() <= 0:
        return None
    draws = document_draws(len(lengths))
    left_R, all_R = left_N[draws].sum(axis=1), all_N[draws].sum(axis=1)
    bounds = np.quantile(left_R / all_R, [0.025, 0.975]).tolist() if all_R.min() > 0 else [None, None]
    return {"share": float(left_N.sum() / all_N.sum()), "low": bounds[0], "high": bounds[1]}


def share_of_gain(rows: Sequence[PrefixRow], n: int) -> GainShare | None:
    """What n-gram routing of one expert, held after `n` tokens, keeps of its gain over embedding routing that goes on."""
    return next((row["gain"] for row in rows if row["prefix_tokens"] == n and "gain" in row), None)


def gain_sentence(rows: Sequence[PrefixRow]) -> str | None:
    """`share_of_gain` in words, in percent of the gain in loss on the tokens that follow; None where there is no gain."""
    if (gain := share_of_gain(rows, GAIN_TOKENS)) is None:
        return None
    low, high, share = gain["low"], gain["high"], f"{100 * gain['share']:.0f}"
    if low is not None and high is not None:
        share += f" [{100 * low:.0f}, {100 * high:.0f}]"
    return (
        f"Held after {GAIN_TOKENS} tokens, n-gram routing of one expert keeps {share} % of its gain over embedding routing "
        "that goes on."
    )


def _row(
    n: int, key: tuple[str, int, bool], mixed_T: np.ndarray, lengths: np.ndarray, dense_T: np.ndarray
) -> PrefixRow:
    found = summarize(mixed_T, lengths, 1, dense_T)
    return {
        "prefix_tokens": n,
        "routing": key[0],
        "top_k": key[1],
        "held": key[2],
        "tokens": len(mixed_T),
        "loss_nats": found["loss_nats"],
        "ratio_to_dense": found["ratio_to_dense"],
        "ratio_low": found["ratio_low"],
        "ratio_high": found["ratio_high"],
    }
