"""The cache: made once, by one process, whole or not at all."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from filelock import FileLock

from trainer.data import Corpus, open_corpus
from trainer.options import DataOptions

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
from trainer.data import open_corpus
from trainer.options import DataOptions
options = DataOptions(source="text", paths=[sys.argv[1]], cache_dir=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
print(open_corpus(options, 16, 0, print).fingerprint, flush=True)
"""


def text_options(tmp_path: Path, size_bytes: int = 600_000) -> DataOptions:
    if not (tmp_path / "a.txt").exists():
        line = b"a line of text, one of many\n"
        (tmp_path / "a.txt").write_bytes(b"".join(b"%d " % n + line for n in range(size_bytes // len(line))))
    return DataOptions(source="text", paths=[f"{tmp_path}/a.txt"], cache_dir=str(tmp_path / "cache"))


def open_text(options: DataOptions) -> Corpus:
    return open_corpus(options, 16, 0)


def start(options: DataOptions, code: str = BUILD) -> subprocess.Popen[str]:
    """A process that gets ready to build the cache, and does so at `go`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, options.paths[0], options.cache_dir],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def go(*processes: subprocess.Popen[str]) -> None:
    """Let the processes build, all at once."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def caches(options: DataOptions) -> list[Path]:
    return [path for path in Path(options.cache_dir).iterdir() if path.is_dir()]


def test_a_second_opening_maps_what_the_first_made(tmp_path: Path) -> None:
    options = text_options(tmp_path)
    first = open_text(options)
    (cache,) = caches(options)
    made = (cache / "train.bin").stat().st_mtime_ns
    assert open_text(options).fingerprint == first.fingerprint
    assert (cache / "train.bin").stat().st_mtime_ns == made
    assert caches(options) == [cache]


def test_a_token_of_bytes_takes_one_byte_on_disk(tmp_path: Path) -> None:
    options = text_options(tmp_path)
    opened = open_text(options)
    assert (caches(options)[0] / "train.bin").stat().st_size == opened.train.num_tokens


def test_changed_files_and_options_are_tokenized_anew(tmp_path: Path) -> None:
    options = text_options(tmp_path)
    fingerprints = {open_text(options).fingerprint}
    fingerprints.add(open_text(dataclasses.replace(options, valid_fraction=0.2)).fingerprint)
    text = (tmp_path / "a.txt").read_bytes()
    (tmp_path / "a.txt").write_bytes(text.replace(b"many", b"much"))  # of the same size
    fingerprints.add(open_text(options).fingerprint)
    assert len(fingerprints) == len(caches(options)) == 3


def test_the_order_of_visits_does_not_touch_the_cache(tmp_path: Path) -> None:
    options = text_options(tmp_path)
    open_corpus(options, 16, 0)
    open_corpus(options, 32, 1)
    assert len(caches(options)) == 1


def test_two_processes_at_once_build_one_cache(tmp_path: Path) -> None:
    options = text_options(tmp_path, size_bytes=20_000_000)
    processes = [start(options), start(options)]
    go(*processes)
    outputs = [process.communicate(timeout=30) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    fingerprints = {out.splitlines()[-1] for out, _ in outputs}
    assert fingerprints == {open_text(options).fingerprint}
    assert len(caches(options)) == 1


def test_one_that_waits_says_so(tmp_path: Path) -> None:
    options = text_options(tmp_path)
    open_text(options)
    (lock,) = Path(options.cache_dir).glob("*.lock")
    (cache,) = caches(options)
    cache.rename(tmp_path / "aside")
    said: list[str] = []
    with FileLock(lock):
        waiting = threading.Thread(target=open_corpus, args=(options, 16, 0, said.append))
        waiting.start()
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not cache.exists()
    waiting.join(10)
    assert "waiting for another process that tokenizes the data" in said[0]
    assert cache.exists()


def test_a_build_killed_halfway_leaves_nothing_that_is_taken_for_a_cache(tmp_path: Path) -> None:
    options = text_options(tmp_path, size_bytes=50_000_000)
    process = start(options)
    go(process)
    cache = Path(options.cache_dir)
    deadline = time.monotonic() + 20
    while not list(cache.glob(".*.partial/train.bin")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    (left,) = cache.glob(".*.partial")
    assert caches(options) == [left]

    opened = open_text(options)
    assert opened.train.num_tokens > 50_000_000 * 0.9
    assert not left.exists() and len(caches(options)) == 1


def test_a_corpus_is_never_in_memory_whole(tmp_path: Path) -> None:
    options = text_options(tmp_path, size_bytes=20_000_000)
    tracemalloc.start()
    open_text(options)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 8_000_000


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    options = text_options(tmp_path)
    with (tmp_path / "a.txt").open("ab") as file:
        file.write(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        open_text(options)
    assert caches(options) == []


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = dataclasses.replace(text_options(tmp_path), cache_dir=f"{tmp_path}/file/cache")
    with pytest.raises(ValueError, match=r"data.cache_dir=.*/file/cache: tokenized data cannot be written there \("):
        open_text(options)


def test_a_full_disk_names_the_cache_folder_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails with an OSError all the same."""
    options = text_options(tmp_path, size_bytes=4_000_000)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    process = start(options, limit + BUILD)
    go(process)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith("ValueError: data.cache_dir=") and "cannot be written there" in error
    assert caches(options) == []


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    options = text_options(tmp_path)
    open_text(options)
    (cache,) = caches(options)
    os.truncate(cache / "train.bin", 1000)
    with pytest.raises(ValueError, match=rf"data.cache_dir: the cache {cache} is damaged \(train.bin has 1000 bytes"):
        open_text(options)
    (cache / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged .* delete that folder"):
        open_text(options)


def test_a_finished_cache_is_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    options = text_options(tmp_path)
    fingerprint = open_text(options).fingerprint
    (lock,) = Path(options.cache_dir).glob("*.lock")
    lock.unlink()
    lock.mkdir()  # whoever wanted to lock would fail
    assert open_text(options).fingerprint == fingerprint


def test_the_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert (
        str(tmp_path / "xdg/atoll/text-")
        in open_text(dataclasses.replace(text_options(tmp_path), cache_dir="")).describe()
    )
