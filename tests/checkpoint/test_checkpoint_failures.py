"""A save that fails, or dies, costs that checkpoint alone; what is kept and what is refused."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from checkpoint import CheckpointError, CheckpointOptions, Checkpoints
from checkpoint.persisted.folder import Folder

_MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_costs_one_checkpoint_and_passes(small_disk: Path, whole, messages: list[str]):
    store = Checkpoints(str(small_disk), CheckpointOptions(keep_last=1, chunk_bytes=_MIB), report=messages.append)
    weight = torch.ones(2 * _MIB)
    store.save(1, [whole("w", weight)], {}, {})
    store.wait()
    (small_disk / "ballast").write_bytes(bytes(12 * _MIB))
    store.save(2, [whole("w", weight * 2)], {}, {})
    assert torch.equal(weight, torch.ones(2 * _MIB))  # training goes on meanwhile
    store.wait()
    assert "No space left on device" in str(store.error())
    assert len(messages) == 1
    for part in (
        "step 2",
        str(small_disk),
        "No space left",
        "checkpoint.url",
        "last good checkpoint is that of step 1",
    ):
        assert part in messages[0]
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "step-00000001"]
    store.open(1).verify()
    (small_disk / "ballast").unlink()
    store.save(3, [whole("w", weight * 3)], {}, {})
    store.wait()
    assert store.error() is None and store.steps() == [3]
    assert store.open(3).read("w", "master", 0, 2 * _MIB).eq(3).all()


def test_kill_9_in_the_midst_of_a_save(tmp_path: Path, whole):
    root = tmp_path / "checkpoints"
    script = Path(__file__).with_name("rank_process.py")
    process = subprocess.Popen(
        [sys.executable, str(script), "save_without_end", "0", "1", str(tmp_path), str(root)],
        env=os.environ | {"PYTHONPATH": str(script.parents[2])},
    )
    store = Checkpoints(str(root), CheckpointOptions(chunk_bytes=_MIB))
    try:
        deadline = time.monotonic() + 60
        while not (len(store.steps()) == 2 and any((root / f"step-{max(store.steps()) + 1:08d}").rglob("c/2*"))):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    step = store.steps()[-1]
    reader = store.open(step)
    reader.verify()
    assert reader.read("w", "master", 5, 1000).eq(step).all()
    store.save(step + 1, [whole("w", torch.zeros(3))], {}, {})
    store.wait()
    assert store.error() is None
    assert sorted(path.name for path in root.iterdir()) == [f"step-{step:08d}", f"step-{step + 1:08d}"]


def test_the_last_ones_are_kept(store: Checkpoints, whole, tmp_path: Path):
    for step in (1, 2, 3, 4):
        store.save(step, [whole("w", torch.ones(3))], {}, {})
    store.wait()
    assert store.steps() == [3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_going_back_replaces_the_later_ones(store: Checkpoints, whole):
    for step in (10, 20):
        store.save(step, [whole("w", torch.ones(3))], {}, {})
    store.save(15, [whole("w", torch.zeros(3))], {}, {})
    store.wait()
    assert store.steps() == [10, 15]


def test_a_step_saved_again_replaces_the_older_only_once_committed(store: Checkpoints, whole, tmp_path: Path):
    root = tmp_path / "checkpoints"
    for value in (1, 2, 3):
        store.save(10, [whole("w", torch.full((3,), float(value)))], {}, {})
        store.wait()
        assert store.steps() == [10]
        assert store.open(10).read("w", "master", 0, 3).eq(value).all()
        assert len(list(root.iterdir())) == 1


def test_a_step_whose_second_save_fails_keeps_the_first(store: Checkpoints, whole, monkeypatch):
    store.save(10, [whole("w", torch.ones(3))], {}, {})
    store.wait()

    def refuse(self: Folder, path: str, *parts: bytes) -> None:
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(Folder, "write", refuse)
    store.save(10, [whole("w", torch.zeros(3))], {}, {})
    store.wait()
    assert "Input/output error" in str(store.error())
    assert store.open(10).read("w", "master", 0, 3).eq(1).all()


def test_a_second_save_waits_for_the_first_and_says_so(store: Checkpoints, whole, messages, monkeypatch):
    release = threading.Event()
    write = Folder.write_atomic
    monkeypatch.setattr(Folder, "write_atomic", lambda *args: (release.wait(20), write(*args))[1])
    store.save(1, [whole("w", torch.ones(3))], {}, {})
    threading.Timer(0.3, release.set).start()
    store.save(2, [whole("w", torch.ones(3))], {}, {})
    store.wait()
    assert messages == ["the checkpoint of step 2 waits: that of step 1 is still being written"]
    assert store.steps() == [1, 2]


def test_a_short_write_is_seen_before_the_commit(store: Checkpoints, whole, monkeypatch):
    write = Folder.write
    monkeypatch.setattr(Folder, "write", lambda self, path, *parts: write(self, path, *parts[:1]))
    store.save(1, [whole("w", torch.ones(3))], {}, {})
    store.wait()
    assert "c/0: written with 16 bytes, but rank 0 finds 12" in str(store.error())
    assert store.steps() == []


def test_memory_needs_no_disk_but_one_worker(whole):
    store = Checkpoints("memory://alone", CheckpointOptions(keep_last=1))
    for step in (1, 2):
        store.save(step, [whole("w", torch.ones(3))], {}, {})
    store.wait()
    assert store.steps() == [2]
    store.open(2).verify()
    with pytest.raises(ValueError, match="checkpoint.url='memory://x'.*launch.workers=1"):
        Checkpoints("memory://x", CheckpointOptions(), rank=0, world=2)


def test_a_url_without_its_package_is_refused():
    fsspec.register_implementation("needspackage", "no_such_package.FileSystem", errtxt="Install no_such_package")
    with pytest.raises(ValueError, match="checkpoint.url='needspackage://x'.*Install no_such_package"):
        Checkpoints("needspackage://x", CheckpointOptions())


def test_a_url_of_no_known_kind_is_refused():
    with pytest.raises(ValueError, match="checkpoint.url='nosuch://x'.*allowed: a path"):
        Checkpoints("nosuch://x", CheckpointOptions())


def test_state_that_would_need_a_pickle_is_refused_at_once(store: Checkpoints, whole):
    with pytest.raises(TypeError, match="object cannot be stored"):
        store.save(1, [whole("w", torch.ones(3))], {"rng": object()}, {})
    assert store.steps() == []


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path, whole, messages: list[str]):
    (tmp_path / "file").write_text("not a folder")
    store = Checkpoints(str(tmp_path / "file" / "x"), CheckpointOptions(), report=messages.append)
    store.save(1, [whole("w", torch.ones(3))], {}, {})
    store.wait()
    assert isinstance(store.error(), CheckpointError)
    assert len(messages) == 1 and "was not written" in messages[0]


def test_failure_to_delete_older_ones_is_no_failed_save(store: Checkpoints, whole, messages, monkeypatch):
    for step in (1, 2):
        store.save(step, [whole("w", torch.ones(3))], {}, {})
        store.wait()

    def refuse(self: Folder, path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", f"{self.path}/{path}")

    monkeypatch.setattr(Folder, "remove", refuse)
    store.save(3, [whole("w", torch.ones(3))], {}, {})
    store.wait()
    assert store.error() is None and 3 in store.steps()
    assert "step 3 is persisted, but older checkpoints were not deleted" in messages[0]
