"""Documents out of every format alike, stable ids, errors with file and line, and documentation of packages."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_ray.config import CorpusConfig
from cbtm_ray.corpus import json_lines, shards
from cbtm_ray.corpus.documents import Document, is_held_out, read_shard, unit_hash
from cbtm_ray.corpus.installed_docs import package_documents
from cbtm_ray.corpus.opening import BOM
from cbtm_ray.corpus.shards import list_shards
from cbtm_ray.errors import UserError

TEXTS = ["first", "caf\u00e9 \U0001f600\nsecond line", "", 'quotes " and \\ slashes', "a\u2028b\x85c"]
ROWS: list[dict[str, Any]] = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]


def corpus(path: Path | str, **fields: Any) -> CorpusConfig:
    return CorpusConfig(paths=(str(path),), **fields)


def read(path: Path | str, **fields: Any) -> list[Document]:
    config = corpus(path, **fields)
    return [document for shard in list_shards(config.paths) for document in read_shard(shard, config)]


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=2)
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", jsonl(ROWS)),
        ("a.json", jsonl(ROWS)),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0)),
        ("a.json.gz", gzip.compress(jsonl(ROWS), mtime=0)),
        ("a.jsonl.zst", zstd(jsonl(ROWS))),
        ("a.json.zst", zstd(jsonl(ROWS))),
        ("a.JSONL", jsonl(ROWS)),
        ("a.ndjson", jsonl(ROWS)),
        ("a.ndjson.zstd", zstd(jsonl(ROWS[:2])) + zstd(jsonl(ROWS[2:]))),
        ("a.jsonl.GZ", gzip.compress(jsonl(ROWS), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(jsonl(ROWS[:2])) + bz2.compress(jsonl(ROWS[2:]))),
        ("a.jsonl.xz", lzma.compress(jsonl(ROWS[:2])) + lzma.compress(jsonl(ROWS[2:]))),
        ("a.jsonl", BOM + jsonl(ROWS)),
        ("a.jsonl.gz", gzip.compress(BOM + jsonl(ROWS[:2]) + BOM + jsonl(ROWS[2:]), mtime=0)),
        ("a.Parquet", parquet(ROWS)),
        ("a.parquet", parquet(ROWS)),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, data: bytes) -> None:
    write(tmp_path / name, data)
    expected = [Document(f"{name}:{row}", text, None) for row, text in enumerate(TEXTS, start=1)]
    assert read(tmp_path) == expected
    assert read(tmp_path / name) == expected


def test_text_files_give_the_same_texts(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        write(tmp_path / f"{number}.txt", text)
    assert read(tmp_path) == [Document(f"{number}.txt", text, None) for number, text in enumerate(TEXTS)]


def test_a_byte_order_mark_and_compression_are_no_part_of_a_text(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", BOM + b"hello")
    write(tmp_path / "b.TXT.xz", lzma.compress(b"hello"))
    assert [document.text for document in read(tmp_path)] == ["hello", "hello"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
LONG_WINDOW = bytes.fromhex("28b52ffd00a87100007b2274657874223a202261227d0a")  # a frame that says 2 GiB
PRETTY = json.dumps(ROWS[0], indent=2).encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        *((f"a.{e}", POINTER, r"is a Git LFS pointer, .* git lfs pull") for e in
          ("jsonl", "txt", "parquet", "jsonl.gz", "json.xz", "jsonl.bz2", "txt.zst")),
        ("a.jsonl", "\ufeff{}".encode("utf-16-le"), "is UTF-16, as its byte-order mark says. Re-encode"),
        ("a.txt", "\ufeffa".encode("utf-16-be"), "is UTF-16, as its byte-order mark says. Re-encode"),
        ("a.jsonl.zst", LONG_WINDOW, r"cannot be read: it needs a zstd window above 128 MiB\. .* zstd -dc --long=31"),
        ("a.jsonl.xz", lzma.compress(jsonl(ROWS))[:-9], r"cannot be read: Compressed file ended before"),
        ("a.jsonl.xz", b"neither", r"cannot be read: Input format not supported"),
        ("a.json", PRETTY, r"is pretty-printed JSON: .* jq -c \. FILE"),
        ("a.json", BOM + PRETTY + b"\n" + PRETTY, r"is pretty-printed JSON: .* jq -c \. FILE"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_named_for_what_it_is(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    write(tmp_path / name, data)
    with pytest.raises(UserError, match=rf"^{name} {message}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "data"), [("n", b"9" * 5000), ("n", b'{"a": [' + b"9" * 5000 + b"]}"), ("b", b'"\xe9"')]
)
def test_the_key_of_a_line_that_python_cannot_hold_is_named(tmp_path: Path, key: str, data: bytes) -> None:
    write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b", "%s": %s}\n' % (key.encode(), data))
    with pytest.raises(UserError, match=rf"^a\.jsonl:2: '{key}' (is not UTF-8|holds a number of too many digits)"):
        read(tmp_path)


@pytest.mark.parametrize("field", ["key", "topic"])
def test_a_time_outside_pythons_years_is_refused_with_row_and_field(tmp_path: Path, field: str) -> None:
    rows = [{"text": "a", "key": "1", "topic": "sea"}] * 1300
    table = pa.Table.from_pylist(rows).drop_columns([field])
    pq.write_table(
        table.append_column(field, pa.array([0] * 1299 + [2**60], pa.timestamp("us"))), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=rf"^a\.parquet:1300: corpus\.\w+='{field}' holds a value .*: .*out of range"):
        read(tmp_path, id_column="key", domain_column="topic")


def test_gzip_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl.gz", b"".join(gzip.compress(jsonl([row])) for row in ROWS))
    assert [document.text for document in read(tmp_path)] == TEXTS


def test_lines_longer_than_a_block_and_a_last_line_without_end(tmp_path: Path) -> None:
    rows = [{"text": "x" * 2_500_000}, {"text": "y" * 1_200_000}, {"text": "z"}]
    write(tmp_path / "a.jsonl", jsonl(rows).rstrip(b"\n"))
    assert [document.text for document in read(tmp_path)] == [row["text"] for row in rows]


def test_lines_are_the_same_wherever_a_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for data, expected in [(b"\n\nab\ncdefgh\n\ni", ["", "", "ab", "cdefgh", "", "i"]), (b"abc\n", ["abc"]), (b"", [])]:
        for size in range(1, 15):
            monkeypatch.setattr(json_lines, "BLOCK_BYTES", size)
            assert [line.decode() for line in json_lines._lines(io.BytesIO(data), "a.jsonl")] == expected


def test_windows_line_ends_are_no_part_of_a_text(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [document.text for document in read(tmp_path)] == ["a", "b"]


def test_columns_can_be_named(tmp_path: Path) -> None:
    rows = [{"body": "a", "topic": "sea", "key": 7}, {"body": "b", "topic": 3, "key": "k"}]
    write(tmp_path / "a.jsonl", jsonl(rows))
    named = read(tmp_path, text_column="body", domain_column="topic", id_column="key")
    assert named == [Document("7", "a", "sea"), Document("k", "b", "3")]


def test_columns_of_parquet_can_be_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", parquet([{"other": 1, "body": "a", "topic": "sea", "key": 7}]))
    named = read(tmp_path, text_column="body", domain_column="topic", id_column="key")
    assert named == [Document("7", "a", "sea")]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_domain_that_is_null_is_none(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "a", "topic": "sea"}, {"text": "b", "topic": None}]
    write(tmp_path / f"a.{suffix}", jsonl(rows) if suffix == "jsonl" else parquet(rows))
    assert [document.domain for document in read(tmp_path, domain_column="topic")] == ["sea", None]


def test_ids_stay_when_the_corpus_moves(tmp_path: Path) -> None:
    write(tmp_path / "here" / "a" / "x.jsonl", jsonl(ROWS))
    write(tmp_path / "here" / "b.txt", "text")
    before = read(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "far" / "there")
    assert read(tmp_path / "far" / "there") == before
    assert read(f"file://{tmp_path}/far/there") == before
    assert read(f"{tmp_path}/far/there/") == before
    assert [document.id for document in before] == ["a/x.jsonl:1", *(f"a/x.jsonl:{n}" for n in range(2, 6)), "b.txt"]


def test_shards_are_in_the_order_of_their_names_whatever_that_of_the_paths(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1" / "b.jsonl", jsonl(ROWS)), write(tmp_path / "2" / "a.jsonl", jsonl(ROWS))
    shards = list_shards((str(first.parent), str(second.parent)))
    assert [shard.names for shard in shards] == [("a.jsonl",), ("b.jsonl",)]
    assert shards == list_shards((str(second.parent), str(first.parent)))
    assert [shard.uris for shard in shards] == [(str(second),), (str(first),)]


def test_other_files_and_hidden_ones_are_no_documents(tmp_path: Path) -> None:
    for name in ["a.jsonl", "README.md", "_SUCCESS.json", ".a.jsonl.1234", "b.csv", "c.jsonl.lz4"]:
        write(tmp_path / name, jsonl(ROWS))
    assert [shard.names for shard in list_shards((str(tmp_path),))] == [("a.jsonl",)]


def test_text_files_share_a_shard_up_to_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "TEXT_SHARD_BYTES", 10)
    for name, size in [("a.txt", 4), ("b.txt", 6), ("c.txt", 1), ("d.txt", 25), ("e.txt", 3)]:
        write(tmp_path / name, "x" * size)
    write(tmp_path / "bb.jsonl", jsonl(ROWS))
    names = sorted(shard.names for shard in list_shards((str(tmp_path),)))
    assert names == [("a.txt", "b.txt"), ("bb.jsonl",), ("c.txt",), ("d.txt",), ("e.txt",)]


def test_small_text_files_are_one_shard(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / f"{number:02d}.txt", "x")
    (shard,) = list_shards((str(tmp_path),))
    assert shard.names == tuple(f"{number:02d}.txt" for number in range(30))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            r"a\.jsonl:2: 'text' is not UTF-8: byte 0xe9 at position 13\. Re-encode",
        ),
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not JSON: Expecting value at column \d+\."),
        (b'{"text": ' + b"[" * 200_000 + b"\n", r"a\.jsonl:1 is JSON nested too deeply\."),
        (b'{"text": "a"}\n["b"]\n', r"a\.jsonl:2 is not a JSON object with keys such as 'text'"),
        (b'{"text": "a"}\n{"text": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:2: 'text' holds a number of too many digits\."),
        (b'{"text": "a"}\n\n{"text": "b"}\n', r"a\.jsonl:2 is an empty line\. Remove it"),
        (b'{"text": "a"}\n  \n', r"a\.jsonl:2 is an empty line"),
        (b'{"text": "a"}\n{"text": 3}\n', r"a\.jsonl:2: corpus\.text_column='text' holds 3, which is not a text"),
        (b'{"text": null}\n', r"a\.jsonl:1: corpus\.text_column='text' holds None, which is not a text"),
        (
            b'{"text": "a"}\n{"body": "b", "topic": "c"}\n',
            r"corpus\.text_column='text' is not in a\.jsonl:2, which has body, topic\. Set corpus\.text_column to one",
        ),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, data: bytes, message: str) -> None:
    write(tmp_path / "a.jsonl", data)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("field", ["text", "key", "topic"])
def test_half_a_surrogate_pair_which_utf8_cannot_hold_is_refused_with_its_line(tmp_path: Path, field: str) -> None:
    rows = [{"text": "a", "key": "1", "topic": "sea"}, {"text": "b", "key": "2", "topic": "sea"} | {field: "\ud83d"}]
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    message = rf"^a\.jsonl:2: corpus\.\w+_column='{field}' holds half a surrogate pair, which UTF-8 cannot hold\. Mend"
    with pytest.raises(UserError, match=message):
        read(tmp_path, id_column="key", domain_column="topic")


@pytest.mark.parametrize("field", ["text", "key", "topic"])
def test_bytes_of_parquet_that_are_not_utf8_are_refused_with_their_row(tmp_path: Path, field: str) -> None:
    """Parquet keeps what a careless writer calls a string; nobody looks at its bytes before they are read."""
    latin1 = pa.array([b"good"] * 1500 + [b"caf\xe9", b"good"])
    columns = {name: pa.array(["x"] * 1502) for name in ("text", "key", "topic")}
    columns[field] = pa.Array.from_buffers(pa.string(), 1502, latin1.buffers())
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    message = rf"^a\.parquet:1501: corpus\.\w+_column='{field}' is not UTF-8: byte 0xe9 at position 3\. Re-encode"
    with pytest.raises(UserError, match=message):
        read(tmp_path, id_column="key", domain_column="topic")


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    with pytest.raises(UserError, match=r"corpus\.paths: .* holds a file whose name is not UTF-8\. Rename the file"):
        list_shards((str(tmp_path),))


@pytest.mark.parametrize("begin", ["[", "\ufeff \n["])
def test_an_array_is_refused_at_its_first_block_with_what_to_do(tmp_path: Path, begin: str) -> None:
    write(tmp_path / "a.json", begin + '{"text": "x"}, ' * 200_000)
    with pytest.raises(UserError, match=r"^a\.json is a JSON array, but each line must be an object .*jq -c '\.\[\]'"):
        read(tmp_path)
    with (tmp_path / "a.json").open("rb") as stream:
        with pytest.raises(UserError, match="is a JSON array"):
            next(json_lines._lines(stream, "a.json"))
        assert stream.tell() == json_lines.BLOCK_BYTES


@pytest.mark.parametrize("field", ["domain", "id"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_missing_column_is_refused_with_those_that_are_there(tmp_path: Path, field: str, suffix: str) -> None:
    rows = [{"text": "a", "topic": "sea", "key": "k"}]
    write(tmp_path / f"a.{suffix}", jsonl(rows) if suffix == "jsonl" else parquet(rows))
    present = (
        rf"corpus\.{field}_column='nope' is not in a\.{suffix}.*, which has text, topic, key\. Set corpus\.{field}"
    )
    with pytest.raises(UserError, match=present):
        read(tmp_path, **{f"{field}_column": "nope"})


def test_an_id_that_is_null_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b'{"text": "a", "key": 1}\n{"text": "b", "key": null}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: corpus\.id_column='key' holds None, which is not an id"):
        read(tmp_path, id_column="key")


def test_a_missing_text_column_of_parquet_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", parquet([{"body": "a", "topic": "sea"}]))
    with pytest.raises(
        UserError, match=r"corpus\.text_column='text' is not in a\.parquet, which has body, topic\. Set"
    ):
        read(tmp_path)


def test_a_text_of_parquet_that_is_no_text_is_refused_with_its_row(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", parquet([{"text": "a"}, {"text": "b"}, {"text": None}]))
    with pytest.raises(UserError, match=r"a\.parquet:3: corpus\.text_column='text' holds None"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, b"neither compressed nor columns")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read(tmp_path)


def test_a_text_file_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "inner" / "a.txt", b"caf\xe9")
    with pytest.raises(UserError, match=r"inner/a\.txt is not UTF-8: byte 0xe9 at position 3"):
        read(tmp_path)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.paths: .*nowhere does not exist\. Give a file or folder that does"):
        list_shards((str(tmp_path / "nowhere"),))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "no document")
    with pytest.raises(
        UserError,
        match=r"README\.md holds no documents, but 1 with \.md \(README\.md\)\. Give files or folders with \.jsonl",
    ):
        list_shards((str(tmp_path / "README.md"),))


def test_a_folder_without_documents_is_refused_by_the_field_it_stands_in(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "no document")
    with pytest.raises(UserError, match=r"corpus\.valid_paths: .* holds no documents"):
        list_shards((str(tmp_path),), "corpus.valid_paths")


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder / "x.jsonl", jsonl(ROWS))
    with pytest.raises(UserError, match=r"two files are called x\.jsonl\. Give the folder above both instead"):
        list_shards((str(tmp_path / "a"), str(tmp_path / "b")))
    assert len(list_shards((str(tmp_path),))) == 2


def test_unit_hash_has_these_values() -> None:
    """Stored corpora depend on them: a change would move documents between the splits."""
    assert [unit_hash(0, "a.jsonl:1"), unit_hash(1, "a.jsonl:1")] == pytest.approx(
        [0.08686375543890136, 0.9674315942614422], abs=1e-15
    )


def test_unit_hash_is_uniform() -> None:
    values = sorted(unit_hash(3, f"document {n}") for n in range(2000))
    distance = max(abs(value - (n + 0.5) / 2000) for n, value in enumerate(values))
    assert distance < 1.63 / math.sqrt(2000)  # Kolmogorov-Smirnov at 1 %
    assert 0 <= values[0] <= values[-1] < 1


@given(document_id=st.text(), seeds=st.lists(st.integers(0, 2**63), min_size=2, max_size=2, unique=True))
def test_unit_hash_differs_between_seeds_and_not_between_calls(document_id: str, seeds: list[int]) -> None:
    first, second = (unit_hash(seed, document_id) for seed in seeds)
    assert first == unit_hash(seeds[0], document_id)
    assert first != second


@settings(max_examples=50)
@given(order=st.permutations(range(40)), fraction=st.floats(0.05, 0.95))
def test_the_split_does_not_depend_on_the_order(order: list[int], fraction: float) -> None:
    config = corpus("x", valid_fraction=fraction)
    held_out = {n for n in order if is_held_out(f"d{n}", config, 0)}
    assert held_out == {n for n in range(40) if is_held_out(f"d{n}", config, 0)}
    assert held_out == {n for n in range(40) if unit_hash(0, f"d{n}") < fraction}


def test_a_larger_held_out_share_keeps_the_smaller_one() -> None:
    ids = [f"d{n}" for n in range(1000)]
    small, large = ({i for i in ids if is_held_out(i, corpus("x", valid_fraction=f), 0)} for f in (0.1, 0.3))
    assert small < large
    assert 70 < len(small) < 130


def test_nothing_is_held_out_where_there_are_held_out_files() -> None:
    config = corpus("x", valid_fraction=0.9, valid_paths=("v",))
    assert not any(is_held_out(f"d{n}", config, 0) for n in range(100))


LONG = "A sentence of documentation that says something. " * 5
PACKAGE = {
    "__init__.py": f'"""{LONG}module"""\nraise RuntimeError("imported")\n',
    "short.py": '"""Too short to be of use."""\n',
    "inner/code.py": f"""
class Thing:
    '''{LONG}class'''

    def method(self):
        r'''{LONG}method'''
        text = '''{LONG}no docstring'''

    async def later(self):
        '''{LONG}async'''
""",
    "again.py": f'"""{LONG}module"""\n',
    "broken.py": f'"""{LONG}broken"""\ndef (:\n',
    "nul.py": f'"""{LONG}nul"""\n\0',
    "half.py": f'"""{LONG}\\ud83d"""\n',
    "notes.txt": f'"""{LONG}notes"""\n',
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on the path that cannot be imported."""
    for name, source in PACKAGE.items():
        write(tmp_path / "documented_package" / name, source)
    monkeypatch.syspath_prepend(tmp_path)
    return "documented_package"


def test_docstrings_of_a_package_are_documents_once_each(package: str) -> None:
    found = list(package_documents(package, 1_000_000))
    assert {document.text.removeprefix(LONG) for document in found} == {"module", "class", "method", "async"}
    assert len(found) == 4
    assert {document.domain for document in found} == {package}
    assert len({document.id for document in found}) == 4
    assert package not in sys.modules


def test_documents_of_a_package_are_the_same_wherever_it_lies(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(package_documents(package, 1_000_000))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / package, tmp_path / "elsewhere" / package)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    assert list(package_documents(package, 1_000_000)) == before


def test_a_package_gives_no_more_than_its_bytes(package: str) -> None:
    everything = list(package_documents(package, 1_000_000))
    sizes = [len(document.text.encode()) for document in everything]
    for cap in (1, sizes[0] - 1, sizes[0], sum(sizes[:2]), sum(sizes[:3]) - 1, sum(sizes)):
        found = list(package_documents(package, cap))
        assert found == everything[: len(found)]
        assert sum(sizes[: len(found)]) <= cap
        assert len(found) == len(everything) or sum(sizes[: len(found) + 1]) > cap


@pytest.mark.parametrize(("length", "count"), [(199, 0), (200, 1)])
def test_a_docstring_needs_200_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, count: int
) -> None:
    write(tmp_path / "sized_package" / "__init__.py", f'"""{"x" * length}"""\nvalue = """{"y" * 500}"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert len(list(package_documents("sized_package", 10_000))) == count


@pytest.mark.parametrize("name", ["no_such_package_anywhere", "os.path", "../x", ""])
def test_a_package_that_is_not_installed_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not an installed package") as caught:
        list(package_documents(name, 1000))
    assert f"corpus.packages: {name!r}" in str(caught.value)
