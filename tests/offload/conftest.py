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
def seed() -> None:
    torch.manual_seed(0)
