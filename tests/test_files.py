"""Whole files or nothing, on local paths and on URIs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cbtm_ray import files


@pytest.fixture(params=["path", "uri"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, once as a path and once as a URI."""
    return str(tmp_path) if request.param == "path" else f"file://{tmp_path}"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_bytes_come_back(base: str, tmp_path: Path) -> None:
    files.write_bytes(files.join(base, "a", "b.bin"), b"\x00\xffhello")
    assert files.read_bytes(files.join(base, "a", "b.bin")) == b"\x00\xffhello"
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\x00\xffhello"
    assert names(tmp_path) == ["a/b.bin"]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".json"])
def test_the_name_does_not_change_the_bytes(base: str, tmp_path: Path, suffix: str) -> None:
    files.write_bytes(files.join(base, f"a{suffix}"), b"plain")
    assert (tmp_path / f"a{suffix}").read_bytes() == b"plain"
    assert files.read_bytes(files.join(base, f"a{suffix}")) == b"plain"


def test_a_failing_write_leaves_nothing(base: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="halfway"), files.writing(files.join(base, "a.txt")) as stream:  # noqa: PT012
        stream.write(b"half")
        raise RuntimeError("halfway")
    assert names(tmp_path) == []


def test_a_failing_write_keeps_the_old_content(base: str, tmp_path: Path) -> None:
    files.write_bytes(files.join(base, "a.txt"), b"old")
    with pytest.raises(KeyboardInterrupt), files.writing(files.join(base, "a.txt")) as stream:  # noqa: PT012
        stream.write(b"new and longer")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_bytes() == b"old"
    assert names(tmp_path) == ["a.txt"]


def test_nothing_is_seen_before_the_block_ends(base: str) -> None:
    with files.writing(files.join(base, "a.txt")) as stream:
        stream.write(b"half")
        assert not files.exists(files.join(base, "a.txt"))
        assert files.list_files(base) == []
    assert files.list_files(base) == [files.join(base, "a.txt")]


def test_a_write_replaces_the_content(base: str) -> None:
    files.write_bytes(files.join(base, "a.txt"), b"long old content")
    files.write_bytes(files.join(base, "a.txt"), b"new")
    assert files.read_bytes(files.join(base, "a.txt")) == b"new"


def test_list_files_is_recursive_sorted_and_hides_files_aside(base: str, tmp_path: Path) -> None:
    for name in ["b.txt", "a/z.txt", "a/.half.txt.1234", "_state.npz", "_logs/x.txt", ".git/x.txt", "a/b_c.d.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert files.list_files(base) == [files.join(base, name) for name in ["a/b_c.d.txt", "a/z.txt", "b.txt"]]


def test_list_files_of_a_missing_folder_is_empty(base: str) -> None:
    assert files.list_files(files.join(base, "nowhere")) == []


def test_listed_files_can_be_read_whatever_their_names(base: str, tmp_path: Path) -> None:
    (tmp_path / "two words 50%.txt").write_bytes(b"found")
    assert [files.read_bytes(uri) for uri in files.list_files(base)] == [b"found"]


def test_a_folder_with_a_hidden_name_above_hides_nothing(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "_run"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("x")
    assert files.list_files(str(folder)) == [str(folder / "a.txt")]


def test_exists_for_files_and_folders(base: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("x")
    found = [files.exists(files.join(base, name)) for name in ["folder", "a.txt", "b.txt", "folder/c"]]
    assert found == [True, True, False, False]


def test_delete_takes_a_file_a_folder_and_nothing(base: str, tmp_path: Path) -> None:
    for name in ["a.txt", "folder/inner/b.txt", "kept.txt"]:
        files.write_bytes(files.join(base, name), b"x")
    for _ in range(2):
        files.delete(files.join(base, "a.txt"))
        files.delete(files.join(base, "folder"))
    assert names(tmp_path) == ["kept.txt"]
    assert not (tmp_path / "folder").exists()


def test_json_comes_back_and_is_readable(base: str, tmp_path: Path) -> None:
    value = {"name": "caf\u00e9", "numbers": [1, 2.5e-3, None, True], "nested": {"a": "b"}}
    files.write_json(files.join(base, "a.json"), value)
    assert files.read_json(files.join(base, "a.json")) == value
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "caf\u00e9" in text
    assert text.endswith("}\n")


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=hnp.arrays(
        st.sampled_from([np.float32, np.int64, np.bool_]), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)
    )
)
def test_arrays_come_back(tmp_path: Path, array: np.ndarray) -> None:
    files.write_array(str(tmp_path / "a.npy"), array)
    back = files.read_array(str(tmp_path / "a.npy"))
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


def test_an_array_of_objects_is_refused_both_ways(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        files.write_array(str(tmp_path / "a.npy"), np.array([{}, None]))
    np.save(tmp_path / "b.npy", np.array([{}, None]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        files.read_array(str(tmp_path / "b.npy"))


def test_publish_folder_copies_all_and_keeps_other_files(base: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "a.bin").write_bytes(b"a" * 100_000)
    (source / "b.txt").write_bytes(b"new")
    files.write_bytes(files.join(base, "target", "b.txt"), b"old")
    files.write_bytes(files.join(base, "target", "kept.txt"), b"kept")
    files.publish_folder(str(source), files.join(base, "target"))
    target = tmp_path / "target"
    assert names(target) == ["b.txt", "inner/a.bin", "kept.txt"]
    assert (target / "b.txt").read_bytes() == b"new"
    assert (target / "inner" / "a.bin").read_bytes() == b"a" * 100_000
    assert (source / "b.txt").read_bytes() == b"new"


def test_local_folder_of_a_local_one_is_itself(base: str, tmp_path: Path) -> None:
    files.write_bytes(files.join(base, "model", "a.txt"), b"x")
    with files.local_folder(files.join(base, "model")) as folder:
        assert os.path.samefile(folder, tmp_path / "model")
    assert (tmp_path / "model" / "a.txt").exists()


def test_absolute_makes_paths_absolute_and_leaves_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert files.absolute("runs/../a") == str(tmp_path / "a")
    assert files.absolute("s3://bucket/a/../b") == "s3://bucket/a/../b"


def test_the_users_home_stands_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    files.write_bytes("~/runs/a.txt", b"x")
    assert names(tmp_path) == ["home/runs/a.txt"]
    assert files.absolute("~/runs") == str(tmp_path / "home" / "runs")
    assert files.list_files("~/runs") == ["~/runs/a.txt"]
    with files.local_folder("~/runs") as folder:
        assert folder == str(tmp_path / "home" / "runs")


def test_a_folder_that_exists_is_opened_and_a_name_is_left_alone(base: str, tmp_path: Path) -> None:
    files.write_bytes(files.join(base, "model", "a.txt"), b"x")
    with files.folder_or_name(files.join(base, "model")) as found:
        assert os.path.samefile(found, tmp_path / "model")
    with files.folder_or_name("someone/model") as found:
        assert found == "someone/model"
