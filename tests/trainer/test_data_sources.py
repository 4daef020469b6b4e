"""What is read, from which files, and what is said of files that cannot be."""

import json
import os
import sys
import sysconfig
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data.files import library_files
from trainer.data.sources import open_source
from trainer.options import DataOptions


def read(source: str, *paths: Path | str, column: str = "text", valid_paths: tuple[str, ...] = ()) -> list[str]:
    options = DataOptions(
        source=source, paths=[str(path) for path in paths], column=column, valid_paths=list(valid_paths)
    )
    return [passage.text.decode() for passage in open_source(options).passages()]


def test_globs_are_read_in_order_of_the_path_each_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read("text", tmp_path / "**/*.txt", tmp_path / "a.txt") == ["a.txt", "b.txt", "deep/er/c.txt"]


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "part[1].txt").write_text("found")
    assert read("text", tmp_path / "part[1].txt") == ["found"]


def test_a_glob_without_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"data.paths=.*\*.text: no file matches \(looked from "):
        read("text", tmp_path / "*.txt", tmp_path / "*.text")
    with pytest.raises(ValueError, match=r"data.valid_paths=.*none.txt: no file matches"):
        read("text", tmp_path / "*.txt", valid_paths=(f"{tmp_path}/none.txt",))


def test_a_folder_is_answered_with_the_glob_for_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no file matches \(it is a folder: say {tmp_path}/\*\*\)"):
        read("text", tmp_path)


def test_valid_paths_that_take_every_file_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="data.valid_paths=.* takes every file of data.paths"):
        read("text", tmp_path / "*.txt", valid_paths=(f"{tmp_path}/a.txt",))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    os.symlink(tmp_path / "gone", tmp_path / "dangling.txt")
    with pytest.raises(ValueError, match=r"data.paths or .*: cannot read .*dangling.txt: No such file"):
        read("text", tmp_path / "*.txt")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file whose reading fails")
def test_an_error_in_the_middle_of_reading_is_named() -> None:
    with pytest.raises(ValueError, match="cannot read /proc/self/mem: Input/output error"):
        read("text", "/proc/self/mem")


def test_text_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8: byte 0xef at byte offset 2 .*iconv"):
        read("text", tmp_path / "latin.txt")


def test_the_byte_is_counted_from_the_start_of_a_long_file(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_bytes(b"a line\n" * 50_000 + b"\xff" + b"a line\n" * 10)
    with pytest.raises(ValueError, match="byte 0xff at byte offset 350000 "):
        read("text", tmp_path / "long.txt")


def test_jsonl_reads_the_column_of_each_line(tmp_path: Path) -> None:
    rows = [{"body": "one\ntwo", "id": 1}, {"body": "é😀"}, {"body": None}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert read("jsonl", tmp_path / "a.jsonl", column="body") == ["one\ntwo", "é😀", ""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": cut}', r"a.jsonl:2 is not JSON: Expecting value at column 10"),
        (b'{"body": "x", "id": 1}', r"data.column=text: .*a.jsonl:2 has no such field; it has body, id"),
        (b'["text"]', r"data.column=text: .*a.jsonl:2 is a JSON list, not an object"),
        (b'{"text": 5}', r"data.column=text: at .*a.jsonl:2 it is int, not a string"),
        (b'{"text": "\\ud83d"}', r"data.column=text: .*a.jsonl:2 holds half a surrogate pair"),
        (b'{"text": "\xe9"}', r"a.jsonl:2 is not UTF-8: byte 0xe9 at byte offset 25 "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        read("jsonl", tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_reads_the_column_over_row_groups(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"row {n} é" for n in range(1000)] + [None]
    column = pa.array(texts).cast(kind) if kind != pa.string_view() else pa.array(texts, kind)
    pq.write_table(pa.table({"text": column, "n": range(1001)}), tmp_path / "a.parquet", row_group_size=300)
    assert read("parquet", tmp_path / "a.parquet") == [text or "" for text in texts]


def test_a_missing_column_of_parquet_is_answered_with_those_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data.column=text: .*a.parquet has no such column; it has body, n"):
        read("parquet", tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data.column=n: in .*a.parquet it is of type int64, not string"):
        read("parquet", tmp_path / "a.parquet", column="n")


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"a.parquet is not a sound Parquet file"):
        read("parquet", tmp_path / "a.parquet")


def test_parquet_text_that_is_not_utf8_is_named_with_the_row(tmp_path: Path) -> None:
    column = pa.array([b"ok", b"na\xefve"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet row 1 is not UTF-8: byte 0xef at byte offset 2"):
        read("parquet", tmp_path / "a.parquet")


def test_a_dataset_folder_is_read(tmp_path: Path) -> None:
    texts = [f"row {n}" for n in range(600)]
    datasets.Dataset.from_dict({"text": texts, "n": list(range(600))}).save_to_disk(tmp_path / "set")
    assert read("datasets", tmp_path / "set") == texts
    with pytest.raises(ValueError, match="data.column=body: .*set has no such column; it has text, n"):
        read("datasets", tmp_path / "set", column="body")


def test_of_a_dataset_with_splits_each_is_read_for_its_purpose(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    options = DataOptions(source="datasets", paths=[str(tmp_path / "set")], valid_paths=[str(tmp_path / "set")])
    assert [passage.text for passage in open_source(options).passages()] == [b"train"]
    assert [passage.text for passage in open_source(options, valid=True).passages()] == [b"validation"]


def test_a_dataset_without_the_split_says_which_it_has(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="data.paths=.*set: the dataset has no split 'train'; it has test"):
        read("datasets", tmp_path / "set")


def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.paths=.*: neither a folder written by save_to_disk nor a dataset"):
        read("datasets", tmp_path)


@pytest.mark.parametrize(("source", "module"), [("parquet", "pyarrow"), ("datasets", "datasets")])
def test_a_missing_package_is_answered_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, module: str
) -> None:
    (tmp_path / "a").write_text("")
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    with pytest.raises(ValueError, match=rf"data.* needs the package {module} .*pip install 'atoll\[hf\]'"):
        read(source, tmp_path / "a")


def test_the_library_is_read_without_installed_packages_and_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("os.py", "json/decoder.py", "json/tests/test_a.py", "site-packages/numpy.py", "dist-packages/apt.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    os.symlink(tmp_path / "gone", tmp_path / "sitecustomize.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in library_files()] == ["json/decoder.py", "os.py"]


def test_an_interpreter_without_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"data.source=stdlib: no \*.py files under .*data.source=text"):
        library_files()


def test_library_source_is_read_in_the_encoding_it_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.py").write_bytes("# coding: latin-1\n# naïve\n".encode("latin-1"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert [passage.text.decode() for passage in open_source(DataOptions()).passages()] == [
        "# coding: latin-1\n# naïve\n"
    ]
