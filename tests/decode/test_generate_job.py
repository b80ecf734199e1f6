"""`python -m jobs.generate` as a user runs it, on a finished run."""

from __future__ import annotations

import functools
import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from cbtm_ray import files
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.decode.engine import generate
from cbtm_ray.decode.generate import main, stream_text
from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request, Step
from cbtm_ray.decode.text import TextAssembler
from cbtm_ray.merge.ensemble import load_ensemble
from cbtm_ray.models import save_model
from cbtm_ray.run import Run
from cbtm_ray.stages import expert_folder

pytestmark = pytest.mark.ray  # for the finished run; the job itself does without

SPEECH = "the ship \U0001f6a2\U0001f6a2 sailed"
POSITIONS = 6000


def command(run_dir: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "jobs.generate", "--run", run_dir, *options]


def output(*arguments: str, stdin: bytes = b"") -> tuple[str, str]:
    """Standard output and standard error of the command."""
    done = subprocess.run(command(*arguments), input=stdin, capture_output=True, check=True, timeout=240)
    return done.stdout.decode(), done.stderr.decode()


def recite(tokenizer: PreTrainedTokenizerBase, speech: str) -> GPT2LMHeadModel:
    """A model that says the same at every position whatever it has read: the speech, over and over."""
    vocabulary, spoken = len(tokenizer), encode(tokenizer, [speech])[0]
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=vocabulary, n_embd=vocabulary, n_head=1, n_layer=1, n_positions=POSITIONS, **ends)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln" not in name:
                parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(vocabulary) / 100)
        model.transformer.wpe.weight[torch.arange(POSITIONS), np.resize(spoken, POSITIONS)] = 10
    return model


@pytest.fixture(scope="module")
def reciting_run(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run both of whose experts recite."""
    folder = tmp_path_factory.mktemp("reciting")
    for name in ("tokenizer", "clusterer", "evaluation", "ngrams"):
        shutil.copytree(finished_run.uri(name), folder / name)
    tokenizer = load_tokenizer(finished_run.uri("tokenizer"))
    for cluster in range(2):
        save_model(recite(tokenizer, SPEECH), tokenizer, str(folder / expert_folder(cluster)))
    return str(folder)


@pytest.mark.parametrize(
    ("options", "changes", "sampling"),
    [
        ([], {}, {}),
        (["--seed", "7", "--top-k", "2"], {"top_k": 2}, {"seed": 7}),
        (["--strategy", "lockstep"], {"strategy": "lockstep"}, {}),
        (["--routing", "embedding", "--temperature", "0"], {}, {"temperature": 0}),
        (["--temperature", "0.7", "--top-p", "0.9", "--seed", "3"], {}, {"temperature": 0.7, "top_p": 0.9, "seed": 3}),
    ],
)
def test_the_text_is_the_engines(
    finished_run: Run,
    capsys: pytest.CaptureFixture,
    options: list[str],
    changes: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """A hardly trained model of bytes: much of the text is no UTF-8."""
    ensemble, tokenizer = load_ensemble(finished_run.dir, routing="embedding" if "embedding" in options else None)
    fields = {"top_k": 1, "max_tokens": 60, "sampling": Sampling(**sampling), **changes}
    steps = list(generate(ensemble, Request(prompt=encode(tokenizer, ["the ship"])[0].tolist(), **fields)))
    given = [step.token for step in steps if step.finish_reason != "stop"]
    capsys.readouterr()  # what loading the experts here has printed
    assert main("", ["--run", finished_run.dir, "--prompt", "the ship", "--max-tokens", "60", *options]) == 0
    text, said = capsys.readouterr()
    assert text == tokenizer.decode(given) + "\n"
    assert said.startswith(f"{len(steps)} tokens in ")
    assert said.count("\n") == 1
    if not options:
        assert output(finished_run.dir, "--prompt", "-", "--max-tokens", "60", stdin=b"the ship\n")[0] == text


def test_characters_are_whole_and_a_stop_string_ends_the_text(reciting_run: str, capsys: pytest.CaptureFixture) -> None:
    options = ["--prompt", "th", "--temperature", "0", "--max-tokens", "60"]
    assert main("", ["--run", reciting_run, *options]) == 0
    text, _ = capsys.readouterr()
    assert text[:-1] in SPEECH * 4
    assert text.count("\U0001f6a2\U0001f6a2") >= 1
    assert main("", ["--run", reciting_run, *options, "--stop", "nowhere", "--stop", "\U0001f6a2 s"]) == 0
    stopped, said = capsys.readouterr()
    assert stopped == text[: text.index("\U0001f6a2 s")] + "\n"
    assert not said.startswith("60 tokens")


def test_tokens_are_printed_as_they_come_and_ctrl_c_ends_it(reciting_run: str) -> None:
    """Thousands of tokens are to come when the first character is there."""
    arguments = command(reciting_run, "--prompt", "", "--max-tokens", str(POSITIONS - 2), "--strategy", "lockstep")
    # A shell lets its background jobs, this one perhaps, ignore SIGINT; Ctrl-C is for a process that does not.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=240)
    assert process.returncode == 130
    assert rest.endswith(b"\n")
    assert said == b""


def test_a_reader_that_leaves_ends_it(reciting_run: str) -> None:
    arguments = command(reciting_run, "--prompt", "", "--max-tokens", str(POSITIONS - 2), "--strategy", "lockstep")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE


def test_experts_are_shown_in_colors(
    finished_run: Run, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal there are no colors, with one the same text in colors."""
    options = ["--run", finished_run.dir, "--prompt", "the ship", "--max-tokens", "20", "--temperature", "0"]
    assert main("", [*options, "--show-experts"]) == 0
    plain, said = capsys.readouterr()
    summary, *lines = said.splitlines()
    shares = re.findall(r"(\d) \((\d+)%\)", summary.partition("experts by mean weight: ")[2])
    assert sum(int(percent) for _, percent in shares) in (99, 100, 101)
    assert [tuple(line.split()[1:3]) for line in lines] == [(expert, f"{percent}%") for expert, percent in shares]
    clusters = files.read_json(finished_run.uri("clusterer", "manifest.json"))["clusters"]
    terms = {str(row["cluster"]): row["top_terms"] for row in clusters}
    assert all(line.endswith(", ".join(terms[expert])) for line, (expert, _) in zip(lines, shares, strict=True))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert main("", [*options, "--show-experts"]) == 0
    colored = capsys.readouterr().out
    assert re.sub("\x1b\\[[0-9]+m", "", colored) == plain != colored
    assert main("", options) == 0
    assert capsys.readouterr().out == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 must be at least 0"),
        (["--prompt", "a", "--top-k", "3"], "top_k=3 must be between 1 and 2"),
        (["--prompt", "a", "--routing", "nearest"], "routing='nearest' was not evaluated in run_dir="),
        (["--prompt", "a", "--routing", "prefix"], "routing='prefix' cannot be served, for it needs every expert's"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens=0 must be at least 1"),
        (["--prompt", "a", "--strategy", "greedy"], "strategy='greedy' must be one of lockstep"),
        (["--prompt", "a", "--stop", ""], "stop='' must be at least one character"),
        (["--prompt", "\U0001f6a2" * 50], "with a prompt of 200 tokens takes 201 positions, which must be at most 128"),
        (["--prompt", "-"], "--prompt must be UTF-8, which byte 3 is not"),
        (
            ["--prompt", "the\udcff"],
            "--prompt must be UTF-8, which byte 3 is not",
        ),
    ],
)
def test_a_users_mistake_is_one_line(
    finished_run: Run,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the\xff")))
    assert main("", ["--run", finished_run.dir, *options]) == 2
    text, said = capsys.readouterr()
    assert text == ""
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("place", ["", "missing", "nowhere://bucket/run"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, place: str) -> None:
    run_dir = place if "://" in place else str(tmp_path / place)
    assert main("", ["--run", run_dir, "--prompt", "a"]) == 2
    expected = "error: --run=nowhere://bucket/run cannot be reached" if "://" in place else "is not a finished run"
    assert expected in capsys.readouterr().err


def test_neither_help_nor_decoding_imports_ray(finished_run: Run) -> None:
    code = f"""
import contextlib, sys
from cbtm_ray.decode.generate import main
with contextlib.suppress(SystemExit):
    main("", ["--help"])
assert not {{"ray", "sklearn", "torch", "transformers"}} & set(sys.modules)
assert main("", ["--run", {finished_run.dir!r}, "--prompt", "a", "--max-tokens", "1"]) == 0
assert not {{"ray", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_the_text_of_held_back_tokens_comes_with_the_one_that_makes_it_certain(finished_run: Run) -> None:
    tokenizer = load_tokenizer(finished_run.uri("tokenizer"))
    tokens = encode(tokenizer, ["\U0001f6a2!xy"])[0].tolist()
    steps = [Step(token=token, logprob=None, weights_K=np.ones(1), expert=0) for token in tokens]
    pieces = [text for _, text in stream_text(steps, TextAssembler(tokenizer, ["xyz"]))]
    assert pieces == ["", "", "", "\U0001f6a2", "!", "", ""]
    last = Step(token=tokenizer.eos_token_id, logprob=None, weights_K=np.ones(1), expert=0, finish_reason="stop")
    assert [text for _, text in stream_text([*steps, last], TextAssembler(tokenizer, ["xyz"]))] == [*pieces, "xy"]
