"""Few-shot tasks: what is read, how prompts are put together, and accuracies by hand."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cbtm_ray import files
from cbtm_ray.config import EvaluateConfig
from cbtm_ray.corpus.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.evaluate.fewshot import Prompts, Task, make_prompts, read_task
from cbtm_ray.evaluate.perplexity import score_documents
from cbtm_ray.evaluate.scoring import fewshot_prompts
from cbtm_ray.merge.routers import Route
from cbtm_ray.merge.scores import ScoredHalf
from cbtm_ray.models import load_model
from cbtm_ray.pipeline import run_job
from cbtm_ray.report import terminal
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER

TOKENIZER = train_tokenizer([], 258)  # a token a byte
TASK = Task(
    "mood",
    ["bad", "good"],
    {"train": [(f"text {n} of the shots", n % 2) for n in range(6)], "test": [("abcdefghij", 1), ("k", 0), ("lm", 1)]},
)
OPTIONS = {"shots": 2, "seeds": (13, 21), "examples": 9, "sequence_length": 60, "random_state": 0}


def write(path: Path, rows: list) -> str:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.name.endswith(".gz") else lines)
    return str(path)


def example(text: str = "t", label: str = "good", split: str = "train") -> dict[str, str]:
    return {"text": text, "label": label, "split": split}


@pytest.mark.parametrize("name", ["mood.jsonl", "mood.jsonl.gz"])
def test_a_task_is_read_from_a_file(tmp_path: Path, name: str) -> None:
    rows = [example("a", "good"), "", example("b", "bad", "test"), {**example("c", "good", "test"), "more": 1}]
    task = read_task(write(tmp_path / name, rows))
    assert task == Task("mood", ["bad", "good"], {"train": [("a", 1)], "test": [("b", 0), ("c", 1)]})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([example(), "{"], "line 2 is not JSON"),
        ([example(), example(split="dev")], r"line 2 must have a text, a label and a split \('train' or 'test'\)"),
        ([example(), {"text": "t", "label": 1, "split": "test"}], "line 2 must have a text, a label"),
        ([example(), [1]], "line 2 must have a text, a label"),
        ([example()], r"has the labels \['good'\], at least 2 are needed"),
    ],
)
def test_what_is_not_a_task_is_refused_by_its_line(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_task(write(tmp_path / "mood.jsonl", rows))


def test_a_missing_file_and_a_task_named_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.jsonl' is not a file"):
        read_task(str(tmp_path / "no.jsonl"))
    with pytest.raises(ValueError, match="names a task twice"):
        EvaluateConfig(fewshot=("a/mood.jsonl", "b/mood.jsonl.gz"))


def test_a_prompt_shows_the_shots_of_its_seed_and_ends_in_each_label() -> None:
    prompts = make_prompts(TASK, TOKENIZER, **OPTIONS)
    texts = [TOKENIZER.decode(sequence) for sequence in prompts.tokens]
    assert len(texts) == 2 * 3 * 2 + 2 * 2
    assert all(len(sequence) <= 60 for sequence in prompts.tokens)
    room = (60 - 3 * (1 + 4 + 2)) // 3
    shots = [[TASK.examples["train"][i] for i in np.random.default_rng(seed).permutation(6)[:2]] for seed in (13, 21)]
    order = np.random.default_rng(0).permutation(3)
    asked = [TASK.examples["test"][i] for i in order]
    expected = [
        "".join(f"{text[:room]}\n{TASK.labels[c]}\n\n" for text, c in shown) + f"{text[:room]}\n{label}"
        for shown in shots
        for text, _ in asked
        for label in TASK.labels
    ]
    expected += [
        "".join(f"{text[:room]}\n{TASK.labels[c]}\n\n" for text, c in shown) + f"\n{label}"
        for shown in shots
        for label in TASK.labels
    ]
    assert texts == expected
    assert prompts.answers.tolist() == [c for _, c in asked]
    rows, first, empty = prompts.label_rows()
    stream = np.concatenate(prompts.tokens)
    assert TOKENIZER.decode(stream[rows]) == "badgood" * 6
    assert TOKENIZER.decode(stream[np.unique(first)]) == "bg" * 6
    assert TOKENIZER.decode(stream[empty]) == "badgood" * 6
    ends = np.cumsum(prompts.lengths)
    for seed in (0, 1):  # the label tokens behind the empty text of the same seed, whatever the example
        bad, good = ends[12 + 2 * seed : 14 + 2 * seed]
        behind = [*range(bad - 3, bad), *range(good - 4, good)]
        assert empty.reshape(2, 21)[seed].tolist() == behind * 3


def test_examples_and_room_are_checked() -> None:
    with pytest.raises(UserError, match=r"mood has 6 examples of 'train' and 3 of 'test'; evaluate\.fewshot_shots=7"):
        make_prompts(TASK, TOKENIZER, **OPTIONS | {"shots": 7})
    with pytest.raises(UserError, match=r"sequence_length=23 is too short for 2 .* Lower .* to at most 1\."):
        make_prompts(TASK, TOKENIZER, **OPTIONS | {"sequence_length": 23})
    make_prompts(TASK, TOKENIZER, **OPTIONS | {"sequence_length": 23, "shots": 1})


def test_accuracies_by_hand() -> None:
    """Two seeds, two examples, labels of one and two tokens."""
    tokens = [np.zeros(3), np.zeros(4)] * 4 + [np.zeros(2), np.zeros(3)] * 2
    prompts = Prompts(tokens, np.array([1, 2] * 4), np.array([1, 0]), n_seeds=2)
    label_logprobs = np.log([
        0.4, 0.9, 0.5,  # 0.4 against 0.45: right
        0.4, 0.9, 0.5,  # the other example, whose label is the first: wrong
        0.4, 0.9, 0.4,  # wrong
        0.4, 0.9, 0.4,  # right
    ])  # fmt: skip
    # Without a text 0.6 against 0.5 * 0.9: the first label gains 4/6, the second 1 in the first seed, 0.8 in the other.
    empty_logprobs = np.log([0.6, 0.9, 0.5] * 4)
    found = prompts.accuracies(label_logprobs, empty_logprobs)
    assert {scoring: each.tolist() for scoring, each in found.items()} == {
        "likelihood": [0.5, 0.5],
        "calibrated": [0.5, 0.5],
    }
    found = prompts.accuracies(np.log([0.4, 0.9, 0.4, 0.7, 0.9, 0.5] * 2), empty_logprobs)
    assert {scoring: each.tolist() for scoring, each in found.items()} == {
        "likelihood": [0.5, 0.5],  # the first label both times
        "calibrated": [1.0, 1.0],  # 4/6 against 0.8, 7/6 against 1
    }


def test_weights_are_held_from_the_prompt_or_run_on() -> None:
    """Expert 0 is nearest before the label, expert 1 from its second token on."""
    tokens = [np.zeros(3), np.zeros(3), np.zeros(2), np.zeros(2)]
    prompts = Prompts(tokens, np.array([2, 2]), np.array([0]), n_seeds=1)
    distances_TK = np.array([[0, 9], [0, 9], [9, 0]] * 2 + [[0, 9]] * 4, np.float32)
    with_text = [[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.1, 0.9]]
    empty = [[0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.09, 0.95]]
    logprobs_TK = np.log(with_text + empty).astype(np.float32)
    route = Route(routing="embedding", top_k=1, settings={"temperature": 1.0}, prefix_tokens=1)
    found = prompts.mixture_accuracies(ScoredHalf(prompts.lengths, logprobs_TK, distances_TK), route)
    assert {key: accuracies.tolist() for key, accuracies in found.items()} == {
        ("held", "likelihood"): [1.0],
        ("held", "calibrated"): [0.0],  # 0.9 / 0.9 against 0.1 / 0.09
        ("running", "likelihood"): [0.0],
        ("running", "calibrated"): [1.0],  # 0.1 / 0.1 against 0.9 / 0.95: the empty text has the same weights
    }


@pytest.fixture(scope="module")
def fewshot_run(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the finished run, with its own documents' domains as a task, evaluated again."""
    folder = tmp_path_factory.mktemp("fewshot") / "run"
    shutil.copytree(finished_run.dir, folder, ignore=shutil.ignore_patterns("evaluation", "checkpoints", "average"))
    config = dataclasses.replace(finished_run.config, run=dataclasses.replace(finished_run.config.run, dir=str(folder)))
    run_job(Run(config), "make_fewshot_task")
    task = str(folder / "fewshot" / "domains.jsonl")
    asked = dataclasses.replace(config.evaluate, fewshot=(task,), fewshot_shots=1, fewshot_examples=8)
    run = Run(dataclasses.replace(config, evaluate=asked))
    run.open()
    run_job(run, "evaluate_mixture")
    return run


@pytest.mark.ray
def test_the_domains_of_held_out_documents_are_a_task(fewshot_run: Run) -> None:
    task = read_task(fewshot_run.uri("fewshot", "domains.jsonl"))
    assert task.labels == ["kitchen", "law", "sea", "stars"]
    assert len(task.examples["train"]) + len(task.examples["test"]) == fewshot_run.manifest("fewshot")["examples"]
    assert all(abs(len(examples) - 20) < 10 for examples in task.examples.values())


@pytest.mark.ray
def test_every_system_has_its_accuracy(fewshot_run: Run, capsys: pytest.CaptureFixture) -> None:
    results = files.read_json(fewshot_run.uri("evaluation", "results.json"))
    rows = results["fewshot"]
    single = [(row["system"], row["weights"], row["scoring"]) for row in rows[:6]]
    scorings = ("likelihood", "calibrated")
    assert single == [(system, None, scoring) for system in ("majority", "seed", "dense") for scoring in scorings]
    routed = (row for row in results["rows"] if row["system"] == "cbtm" and row["routing"] != "oracle")
    mixtures = {(row["routing"], row["top_k"]) for row in routed}
    found = {(row["routing"], row["top_k"], row["weights"], row["scoring"]) for row in rows[6:]}
    assert found == {
        (*mixture, w, scoring) for mixture in mixtures for w in ("held", "running") for scoring in scorings
    }
    for row in rows:
        assert row["accuracy"] == pytest.approx(np.mean(row["accuracies"]))
        assert row["accuracy_std"] == pytest.approx(np.std(row["accuracies"]))
        assert len(row["accuracies"]) == 5
        assert row["examples"] == 8
    terminal.print_results(fewshot_run)
    assert f"{100 * rows[5]['accuracy']:.1f} +- {100 * rows[5]['accuracy_std']:.1f}" in capsys.readouterr().out
    assert f'value="{100 * rows[5]["accuracy"]}"' in files.read_bytes(fewshot_run.uri("report.html")).decode()


@pytest.mark.ray
def test_the_dense_accuracy_is_that_of_its_own_probabilities(fewshot_run: Run) -> None:
    prompts = fewshot_prompts(fewshot_run, fewshot_run.config.evaluate.fewshot[0])
    end = load_tokenizer(fewshot_run.uri("tokenizer")).convert_tokens_to_ids(END_OF_TEXT)
    model = load_model(fewshot_run.uri(DENSE_FOLDER))
    logprobs = score_documents(model, prompts.tokens, sequence_length=32, end_of_text=end, batch_tokens=999)
    ends = np.cumsum(prompts.lengths)
    lengths = [*prompts.label_lengths, *prompts.label_lengths[:4].tolist() * 5]
    totals = [logprobs[last - length : last].sum() for last, length in zip(ends, lengths, strict=True)]
    with_text, empty = np.reshape(totals[:160], (5, 8, 4)), np.reshape(totals[160:], (5, 1, 4))
    rows = files.read_json(fewshot_run.uri("evaluation", "results.json"))["fewshot"]
    for scoring, scores in (("likelihood", with_text), ("calibrated", with_text - empty)):
        dense = next(row for row in rows if (row["system"], row["scoring"]) == ("dense", scoring))
        assert dense["accuracies"] == pytest.approx((scores.argmax(axis=2) == prompts.answers).mean(axis=1).tolist())
