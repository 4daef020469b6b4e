import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.hostpool import HostPool, _library


@pytest.fixture(scope="session")
def pool() -> Iterator[HostPool]:
    """Two threads that run the C code."""
    with HostPool(2) as made:
        if not made.native:
            pytest.skip("no C compiler")
        yield made


@pytest.fixture
def torch_pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HostPool]:
    """A pool on a machine without a compiler."""
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _library.cache_clear()
    with HostPool(1) as made:
        assert not made.native
        yield made
    _library.cache_clear()


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB, to be filled up."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)
