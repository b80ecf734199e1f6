"""A mistake that shows before Ray starts: one line, exit code 2, and nothing there is touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cbtm_ray.cli import main
from tests.support.tiny import tiny_tree, write_corpus


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path / "run", write_corpus(tmp_path / "corpus", documents=8))))
    return str(path)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a disk, and only Linux has tmpfs")
    with pytest.raises(OSError, match="No space"):
        (folder / "filling").write_bytes(bytes(1 << 16))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def refusal(capsys: pytest.CaptureFixture[str], config: str, *overrides: str) -> str:
    """The one line that the whole run ends with."""
    assert main("", "run_all", ["--config", config, *overrides]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    return said.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.betas=[0.9]", "train.betas=[0.9] has too few values. Give at least 2."),
        ("train.learning_rate=true", "train.learning_rate=True: must be a number."),
        ("corpus.text_column=", "corpus.text_column=None: must be a valid string."),
        ("corpus.paths=documents", "corpus.paths='documents': must be a list."),
        ("corpus.paths=[/nowhere]", "corpus.paths: /nowhere does not exist. Give a file or folder that does."),
        ("tokens.tokenizer=/nowhere", "tokens.tokenizer='/nowhere' does not exist."),
        ("run.dir=foo://bucket/run", "run.dir=foo://bucket/run cannot be reached: "),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path, override: str, message: str
) -> None:
    assert message in refusal(capsys, config, override)
    assert not (tmp_path / "run" / "corpus").exists()


def test_checking_starts_and_writes_nothing(capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path) -> None:
    assert main("", "run_all", ["--config", config, "--check"]) == 0
    assert capsys.readouterr().out == "The configuration and all that it names are in order. Nothing was started.\n"
    assert "corpus.paths: /nowhere does not exist" in refusal(capsys, config, "--check", "corpus.paths=[/nowhere]")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str], config: str, full_disk: Path) -> None:
    message = f"run.dir={full_disk}/run: no space left on the device. Free some, or give another run.dir"
    assert message in refusal(capsys, config, f"run.dir={full_disk}/run")
    assert not [path for path in (full_disk / "run").rglob("*") if path.is_file()]
