"""Which files are read: every real file once, and a word for those that are not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cbtm_ray.config import CorpusConfig
from cbtm_ray.corpus.shards import list_corpus, list_shards, say_left_out
from cbtm_ray.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two files of documents in a folder."""
    for name in ("2024/a.jsonl", "b.jsonl"):
        make(tmp_path / "data" / name)
    return tmp_path / "data"


def make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"text": path.name}) + "\n")


def names(*paths: Path | str) -> list[str]:
    return [name for shard in list_shards(tuple(map(str, paths))) for name in shard.names]


def left_out(*paths: Path) -> dict[str, int]:
    found = list_corpus(CorpusConfig(paths=tuple(map(str, paths))))[1]
    return {reason: entry["files"] for reason, entry in found.items()}


AGAIN = "met again by a link or another path"


def test_a_file_that_links_lead_to_is_read_once_by_its_own_name(data: Path) -> None:
    (data / "0").symlink_to("2024")
    (data / "a.jsonl").symlink_to("b.jsonl")
    os.link(data / "b.jsonl", data / "c.jsonl")
    assert names(data) == ["2024/a.jsonl", "b.jsonl"]
    assert left_out(data) == {AGAIN: 3}


def test_a_folder_of_links_alone_is_read_through_them(data: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "x.jsonl").symlink_to(data / "b.jsonl")
    (tmp_path / "snapshot" / "y").symlink_to(data / "2024")
    assert names(tmp_path / "snapshot") == ["x.jsonl", "y/a.jsonl"]


def test_a_file_below_two_paths_is_read_once_by_the_one_above(data: Path) -> None:
    (data / "2025").symlink_to(data / "2024")
    for paths in ([data, data / "2024"], [data / "2024", data], [data, f"{data}/"], [data, data / "2025", data]):
        assert names(*paths) == ["2024/a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("link", "target"), [("up", "."), ("2024/up", ".."), ("2024/far", "/"), ("other/x", "../2024")]
)
def test_a_loop_of_links_is_refused(data: Path, link: str, target: str) -> None:
    (data / "other").mkdir()
    (data / "2024" / "other").symlink_to("../other")  # no loop yet
    assert names(data) == ["2024/a.jsonl", "b.jsonl"]
    (data / link).symlink_to(target)
    with pytest.raises(UserError, match=r"^corpus\.paths: .* is a link to a folder above it, .*\. Remove the link\."):
        names(data)


@pytest.mark.parametrize("held_out", ["data/2024", "data/2024/a.jsonl", "link", "hard.jsonl", "data", "."])
def test_held_out_files_among_the_others_are_refused_by_both_paths(data: Path, tmp_path: Path, held_out: str) -> None:
    (tmp_path / "link").symlink_to("data/2024")
    os.link(data / "b.jsonl", tmp_path / "hard.jsonl")
    corpus = CorpusConfig(paths=(str(data),), valid_paths=(str(tmp_path / held_out),))
    message = (
        rf"^corpus\.valid_paths={corpus.valid_paths[0]} and corpus\.paths={data} both hold {data}/.*would be trained on"
    )
    with pytest.raises(UserError, match=message):
        list_corpus(corpus)


def test_held_out_files_that_the_paths_leave_out_are_apart(data: Path) -> None:
    make(data / "_valid" / "a.jsonl")
    found, _ = list_corpus(CorpusConfig(paths=(str(data),), valid_paths=(str(data / "_valid"),)))
    assert {split: [shard.names for shard in some] for split, some in found.items()} == {
        "train": [("2024/a.jsonl",), ("b.jsonl",)],
        "valid": [("a.jsonl",)],
    }


def test_what_is_left_out_is_counted_by_the_reason(data: Path) -> None:
    for name in ("README.md", "x/notes.MD", "LICENSE", "_held/h.jsonl", "_held/.git/x", ".b.jsonl", "c.parquet.gz"):
        make(data / name)
    (data / "gone").symlink_to("nowhere")
    os.mkfifo(data / "pipe.jsonl")
    hidden = "with a name in _ or ."
    assert left_out(data) == {
        hidden: 3, "with .md": 2, "without an ending": 1, "with .gz": 1, "links to nothing": 1, "not files": 1,
    }  # fmt: skip
    said = say_left_out(list_corpus(CorpusConfig(paths=(str(data),)))[1])
    assert said.startswith(f"3 {hidden} (.b.jsonl), 2 with .md (README.md), ")


def test_a_link_to_a_document_that_is_not_there_is_refused(data: Path) -> None:
    for name, target in (("c.JSONL.xz", "/nowhere/c"), ("c.txt", "c.txt")):
        (data / name).symlink_to(target)
        for path in (data, data / name):
            with pytest.raises(
                UserError, match=rf"^corpus\.paths: .*/{name} is a link to {target}, which is not there\. "
            ):
                names(path)
        (data / name).unlink()


def test_the_users_home_stands_for_itself(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(data.parent))
    assert names("~/data") == ["2024/a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match=r"^corpus\.paths: ~/nowhere does not exist"):
        names("~/nowhere")


def test_two_files_of_one_name_are_named(data: Path) -> None:
    make(data / "x" / "a.jsonl")
    with pytest.raises(UserError, match=r"two files are called a\.jsonl\. .*: .*/2024/a\.jsonl and .*/x/a\.jsonl"):
        names(data / "2024", data / "x")
