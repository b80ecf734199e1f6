"""Few-shot classification, as the paper evaluates it downstream: labeled examples, a text, and which label follows it best.

A task is a JSONL file (also .gz) of examples, those of 'train' to be shown and those of 'test' to be answered:

    {"text": "A film with a heart.", "label": "positive", "split": "train"}

A label is its own wording: what is scored is the probability of its tokens after the prompt, which shows every example as
text, new line, label, empty line. All models get the same prompts. Two scorings: `likelihood` takes the most probable label,
`calibrated` the one that the text makes more probable most, over the same shots and an empty text (Zhao et al. 2021; Holtzman
et al. 2021 without the shots), since a label of few tokens, or one that is shown often, is probable whatever the text.

S sequences (a prompt and one of the labels), T tokens (of one sequence after the other), K experts, N examples, C labels.
"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from cbtm_ray import files
from cbtm_ray.config import Config, task_name
from cbtm_ray.corpus.tokenizer import encode
from cbtm_ray.errors import UserError
from cbtm_ray.merge.mixture import mix_logprobs
from cbtm_ray.merge.routers import Route
from cbtm_ray.merge.scores import ScoredHalf

TASK_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Task:
    """Examples as (text, index of its label), by split."""

    name: str
    labels: list[str]
    examples: dict[str, list[tuple[str, int]]]


@dataclass(frozen=True)
class Prompts:
    """The same test examples behind the shots of every seed; each prompt stands once for every label."""

    tokens: list[np.ndarray]
    """S = seeds x N x C sequences, the labels of a prompt beside each other; then seeds x C with an empty text."""
    label_lengths: np.ndarray
    """Tokens of the label that ends each of the S sequences, int64 (S,)."""
    answers: np.ndarray
    """Index of the right label of each test example, int64 (N,)."""
    n_seeds: int

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(sequence) for sequence in self.tokens])

    def label_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every label token of the S sequences: its row among all tokens, that of its label's first token, and its row
        behind the same shots and an empty text."""
        n_sequences, ends = len(self.label_lengths), np.cumsum(self.lengths)
        first_S = ends[:n_sequences] - self.label_lengths
        lengths = self.label_lengths.reshape(self.n_seeds, len(self.answers), -1)
        first_empty_S = (ends[n_sequences:].reshape(self.n_seeds, 1, -1) - lengths).ravel()
        within = np.concatenate([np.arange(length) for length in self.label_lengths])
        first, first_empty = (np.repeat(rows_S, self.label_lengths) for rows_S in (first_S, first_empty_S))
        return first + within, first, first_empty + within

    def accuracies(self, label_logprobs: np.ndarray, empty_logprobs: np.ndarray) -> dict[str, np.ndarray]:
        """Share of test examples whose right label is chosen, for every seed, by scoring.

        Args:
            label_logprobs: of the label tokens of the S sequences, one after the other.
            empty_logprobs: of the same tokens behind an empty text.
        """
        starts_S = np.cumsum(self.label_lengths) - self.label_lengths
        totals_S, empty_S = (np.add.reduceat(logprobs, starts_S) for logprobs in (label_logprobs, empty_logprobs))
        return {"likelihood": self._right(totals_S), "calibrated": self._right(totals_S - empty_S)}

    def _right(self, scores_S: np.ndarray) -> np.ndarray:
        chosen = scores_S.reshape(self.n_seeds, len(self.answers), -1).argmax(axis=2)
        return (chosen == self.answers).mean(axis=1)

    def mixture_accuracies(self, held_out: ScoredHalf, route: Route) -> dict[tuple[str, str], np.ndarray]:
        """Accuracies of a mixture, by weights and scoring: the weights of the whole prompt held for the label, and running on
        from token to token. The empty text is scored with the same weights."""
        weights_TK = route.weights(held_out)
        rows, first, empty = self.label_rows()
        return {
            (weights, scoring): found
            for weights, chosen in (("held", first), ("running", rows))
            for scoring, found in self.accuracies(
                *(mix_logprobs(held_out.logprobs_TK[these], weights_TK[chosen]) for these in (rows, empty))
            ).items()
        }


def read_task(uri: str) -> Task:
    """Read a task's file.

    Raises:
        UserError: it is missing, a row is not an example, or there are less than two labels.
    """
    if not files.exists(uri):
        raise UserError(f"evaluate.fewshot={uri!r} is not a file. Give a JSONL file of examples.")
    try:
        data = files.read_bytes(uri)
        lines = (gzip.decompress(data) if uri.endswith(".gz") else data).splitlines()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"evaluate.fewshot={uri!r} cannot be read: {error}. Give a JSONL file of examples.") from error
    rows = [_example(uri, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    labels = sorted({label for _, label, _ in rows})
    if len(labels) < 2:
        raise UserError(f"evaluate.fewshot={uri!r} has the labels {labels}, at least 2 are needed. Add examples.")
    examples = {
        wanted: [(text, labels.index(label)) for text, label, split in rows if split == wanted]
        for wanted in TASK_SPLITS
    }
    return Task(task_name(uri), labels, examples)


def _example(uri: str, number: int, line: bytes) -> tuple[str, str, str]:
    where = f"evaluate.fewshot={uri!r}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}. Correct it.") from error
    found: list[Any] = [row.get(key) if isinstance(row, dict) else None for key in ("text", "label", "split")]
    if not all(isinstance(value, str) and value.strip() for value in found) or found[2] not in TASK_SPLITS:
        raise UserError(f"{where} must have a text, a label and a split ('train' or 'test'), all strings. Correct it.")
    return found[0], found[1], found[2]


def check_shots(task: Task, shots: int) -> None:
    """UserError if the task has fewer examples than a prompt shows, or none to answer."""
    train, test = (task.examples[split] for split in TASK_SPLITS)
    if len(train) < shots or not test:
        raise UserError(
            f"evaluate.fewshot: {task.name} has {len(train)} examples of 'train' and {len(test)} of 'test'; "
            f"evaluate.fewshot_shots={shots} and one are needed. Add examples or lower the shots."
        )


def configured_prompts(uri: str, tokenizer: PreTrainedTokenizerBase, config: Config) -> Prompts:
    """The prompts of one of `evaluate.fewshot`; errors as of `read_task` and `make_prompts`."""
    return make_prompts(
        read_task(uri),
        tokenizer,
        shots=config.evaluate.fewshot_shots,
        seeds=config.evaluate.fewshot_seeds,
        examples=config.evaluate.fewshot_examples,
        sequence_length=config.tokens.sequence_length,
        random_state=config.run.seed,
    )


def make_prompts(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shots: int,
    seeds: tuple[int, ...],
    examples: int,
    sequence_length: int,
    random_state: int,
) -> Prompts:
    """The prompts of a task.

    Args:
        shots: training examples shown in a prompt, drawn anew for each of `seeds` and the same for all test examples.
        examples: test examples at most, drawn once by `random_state`.
        sequence_length: tokens that a sequence may have; every text is cut to an equal share of what the labels leave.

    Raises:
        UserError: too few examples, or the sequence is too short for the labels.
    """
    check_shots(task, shots)
    train, test = (task.examples[split] for split in TASK_SPLITS)
    asked = [test[i] for i in np.random.default_rng(random_state).permutation(len(test))[:examples]]
    labels, [new_line, empty_line] = encode(tokenizer, task.labels), encode(tokenizer, ["\n", "\n\n"])
    longest = max(len(label) for label in labels)
    around = (shots + 1) * (len(new_line) + longest + len(empty_line))
    if (room := (sequence_length - around) // (shots + 1)) < 1:
        raise UserError(
            f"tokens.sequence_length={sequence_length} is too short for {shots} examples of {task.name}, whose labels "
            f"have up to {longest} tokens. Lower evaluate.fewshot_shots to at most "
            f"{sequence_length // (around // (shots + 1) + 1) - 1}."
        )
    questions = [np.append(text[:room], new_line) for text in encode(tokenizer, [text for text, _ in asked])]
    sequences, without_text = list[np.ndarray](), list[np.ndarray]()
    for seed in seeds:
        shown = [train[i] for i in np.random.default_rng(seed).permutation(len(train))[:shots]]
        texts = encode(tokenizer, [text for text, _ in shown])
        parts = [[text[:room], new_line, labels[c], empty_line] for text, (_, c) in zip(texts, shown, strict=True)]
        prefix = np.concatenate([piece for part in parts for piece in part])
        sequences += [np.concatenate([prefix, question, label]) for question in questions for label in labels]
        without_text += [np.concatenate([prefix, new_line, label]) for label in labels]
    return Prompts(
        tokens=sequences + without_text,
        label_lengths=np.tile([len(label) for label in labels], len(seeds) * len(asked)),
        answers=np.array([c for _, c in asked]),
        n_seeds=len(seeds),
    )
