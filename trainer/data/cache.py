"""The tokens of a corpus on disk: made once, then mapped into memory by every worker of the node.

A cache is a folder ``<data.cache_dir>/<source>-<key>`` of ``train.bin`` and ``valid.bin`` (tokens one after the other,
in the smallest unsigned dtype that holds the vocabulary) and ``meta.json``. The key hashes all that decides the tokens,
so a cache is never stale and never changes. It is written beside its place and renamed there whole: a folder of that
name is complete, whatever happened to the process that made it. One process builds, under a file lock; the others wait.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from trainer.data.build import Meta, Recipe, Say, tokenize

WAIT_NOTICE_S = 1.0


class Cache:
    """A complete cache. ValueError where its files are not what ``meta.json`` says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.meta = Meta(**json.loads((folder / "meta.json").read_text()))
            self.tokens = {name: self._map(name) for name in self.meta.tokens}
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"data.cache_dir: the cache {folder} is damaged ({error}); delete that folder") from error

    def _map(self, name: str) -> NDArray[Any]:
        """Read-only, 1-D."""
        path, size = self.folder / f"{name}.bin", self.meta.tokens[name]
        dtype = np.dtype(self.meta.dtype)
        if path.stat().st_size != size * dtype.itemsize:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size * dtype.itemsize}")
        return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)  # nothing cannot be mapped


def open_cache(recipe: Recipe, root: Path, name: str, say: Say) -> Cache:
    """The cache of `recipe` in `root`, built if there is none. ValueError where it cannot be written."""
    folder = root / f"{name}-{recipe.key}"
    if not folder.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f"{folder.name}.lock", say):
                if not folder.exists():
                    _build(recipe, folder, say)
        except OSError as error:  # sources turn their own into ValueError
            raise ValueError(
                f"data.cache_dir={root}: tokenized data cannot be written there ({error}); name a folder with room"
            ) from error
    return Cache(folder)


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=WAIT_NOTICE_S)
    except Timeout:
        say(f"waiting for another process that tokenizes the data (it holds {path})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(recipe: Recipe, folder: Path, say: Say) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # left by a process that was killed: whoever lives would hold the lock
    partial.mkdir()
    try:
        meta = tokenize(recipe, partial, say)
        _write_synced(partial / "meta.json", json.dumps(asdict(meta), indent=2))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
