"""Tokenizing a corpus into flat files, as a stream: a megabyte or so of text in memory at a time.

Documents are laid one after the other, each followed by the end-of-text token, and held out by a hash of their text.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.passages import Passage, Source
from trainer.data.tokenizer import Tokenizer

FORMAT = 1
"""Part of the key of a cache: to be raised with whatever changes the tokens that a recipe gives."""
BATCH_BYTES = 1 << 20
"""Text that is tokenized at a time: keeps the threads of a tokenizer busy, and is little as Python integers."""
PROGRESS_EVERY_S = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the tokens."""

    source: Source
    valid_source: Source | None
    """Documents to validate on; if None, a share of `source` is held out."""
    valid_fraction: float
    tokenizer: Tokenizer

    @property
    def key(self) -> str:
        valid = self.valid_source.identity if self.valid_source else self.valid_fraction
        content = json.dumps([FORMAT, self.source.identity, valid, self.tokenizer.identity])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def placed(self) -> "Iterator[Placed]":
        """Every passage with the split it belongs to."""
        if self.valid_source is None:
            yield from _placed(self.source.passages(), lambda text: _held_out(text, self.valid_fraction))
        else:
            yield from _placed(self.source.passages(), lambda text: False)
            yield from _placed(self.valid_source.passages(), lambda text: True)


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a cache holds: its ``meta.json``."""

    dtype: str
    tokens: dict[str, int]
    """Of ``train`` and ``valid``, the end-of-text tokens included."""
    documents: dict[str, int]
    empty_documents: int
    """Left out of both."""
    text_bytes: int
    fingerprint: str
    """A hash of all tokens: equal on two machines only if they hold the same data."""


def tokenize(recipe: Recipe, folder: Path, say: Say) -> Meta:
    """Write ``train.bin`` and ``valid.bin`` into `folder`. ValueError for bad text, OSError where writing fails."""
    tokenizer = recipe.tokenizer
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    text_bytes = empty = 0
    notice = time.monotonic() + PROGRESS_EVERY_S
    with _Writer(folder / "train.bin", dtype) as train, _Writer(folder / "valid.bin", dtype) as valid:
        for batch in _batches(recipe.placed()):
            for placed, ids in zip(batch, tokenizer.encode([placed.text for placed in batch]), strict=True):
                if not placed.text:
                    empty += 1
                    continue
                text_bytes += len(placed.text)
                (valid if placed.held_out else train).write(ids, tokenizer.end_of_text if placed.ends else None)
            if time.monotonic() > notice:
                say(f"tokenizing: {text_bytes / 1e6:,.0f} MB of text, {train.tokens + valid.tokens:,} tokens so far")
                notice = time.monotonic() + PROGRESS_EVERY_S
    return Meta(
        dtype=dtype.name,
        tokens={"train": train.tokens, "valid": valid.tokens},
        documents={"train": train.documents, "valid": valid.documents},
        empty_documents=empty,
        text_bytes=text_bytes,
        fingerprint=hashlib.sha256(train.digest() + valid.digest()).hexdigest()[:16],
    )


class Placed(NamedTuple):
    text: bytes
    held_out: bool
    ends: bool
    """An end-of-text token follows."""


def _placed(passages: Iterator[Passage], held_out: Callable[[bytes], bool]) -> Iterator[Placed]:
    """A document that goes on in the other split ends in this one, so that no split joins what was apart."""
    passage = next(passages, None)
    here = passage is not None and held_out(passage.text)
    while passage is not None:
        following = next(passages, None)
        there = following is not None and held_out(following.text)
        yield Placed(passage.text, here, ends=not passage.continues or here != there)
        passage, here = following, there


def _held_out(text: bytes, fraction: float) -> bool:
    """Decided by the text alone: not by the order of the files, and the same for every copy of a document."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"valid split").digest()) < fraction * 2**64


def _batches(passages: Iterator[Placed]) -> Iterator[list[Placed]]:
    batch, size = [], 0
    for placed in passages:
        batch.append(placed)
        size += len(placed.text) + 1  # at least one, or a million empty documents were one batch
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends tokens to a file; counts and hashes them. On disk once closed."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.tokens = self.documents = 0
        self._dtype = dtype
        self._file = path.open("wb", buffering=BATCH_BYTES)
        self._hash = hashlib.blake2b(dtype.name.encode())

    def write(self, ids: NDArray[Any], end_of_text: int | None) -> None:
        self._append(ids)
        if end_of_text is not None:
            self._append(np.array([end_of_text]))
            self.documents += 1

    def _append(self, ids: NDArray[Any]) -> None:
        data = ids.astype(self._dtype, copy=False).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(ids)

    def digest(self) -> bytes:
        return self._hash.digest()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
