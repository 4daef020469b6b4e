"""What lies where in a rank's arrays: pieces of state, one after the other, in one 1-D array for each kind and dtype.

Of a persisted checkpoint (`checkpoint/persisted/layout.py`) and of a snapshot alike. Pure: no storage, no threads.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from offload.space import round_up
from offload.state import Piece

PAGE_BYTES = 4096
_KIND = re.compile(r"[A-Za-z0-9_]{1,64}")


class DType(NamedTuple):
    """A dtype of state, as torch and as zarr call it."""

    torch: torch.dtype
    zarr: str
    """The zarr data type with the same bytes."""


_EXACT = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES = {name: DType(getattr(torch, name), name) for name in _EXACT} | {
    "bfloat16": DType(torch.bfloat16, "uint16"),
    "float8_e4m3fn": DType(torch.float8_e4m3fn, "uint8"),
    "float8_e5m2": DType(torch.float8_e5m2, "uint8"),
}


def dtype_name(dtype: torch.dtype) -> str:
    """As in `DTYPES`."""
    return str(dtype).removeprefix("torch.")


def chunk_file(array: str, number: int) -> str:
    """Path of a chunk of the array of that name, in the rank's folder."""
    return f"{array}/c/{number}"


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One 1-D zarr array: `length` elements (at least one) in chunks of `chunk`, the last one padded with zeros."""

    kind: str
    dtype: str
    length: int
    chunk: int

    def __post_init__(self) -> None:
        check(isinstance(self.kind, str) and _KIND.fullmatch(self.kind), f"kind {self.kind!r}")
        check(isinstance(self.dtype, str) and self.dtype in DTYPES, f"dtype {self.dtype!r}")
        check(
            natural(self.length, self.chunk) and 1 <= self.chunk <= self.length,
            f"chunk {self.chunk!r} of {self.length!r}",
        )

    @classmethod
    def cut(cls, kind: str, dtype: str, length: int, chunk_bytes: int) -> "ArrayLayout":
        """Chunks of at most `chunk_bytes`, as even as can be, so that hardly anything is padded. They begin at
        pages: else only the first could be written past the page cache."""
        item_bytes = DTYPES[dtype].torch.itemsize
        num_chunks = math.ceil(length * item_bytes / chunk_bytes)
        chunk = math.ceil(length / num_chunks)
        if num_chunks > 1 and chunk_bytes % PAGE_BYTES == 0:
            chunk = round_up(chunk * item_bytes, PAGE_BYTES) // item_bytes
        return cls(kind=kind, dtype=dtype, length=length, chunk=chunk)

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.dtype}"

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].torch.itemsize

    @property
    def num_chunks(self) -> int:
        return math.ceil(self.length / self.chunk)

    def chunk_file(self, number: int) -> str:
        """Path in the rank's folder."""
        return chunk_file(self.name, number)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where one piece lies: elements ``start:stop`` of `name`, from element `offset` of its kind and dtype's array."""

    name: str
    kind: str
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def __post_init__(self) -> None:
        check(isinstance(self.name, str), f"name {self.name!r}")
        check(natural(self.start, self.stop, self.offset, *self.shape), f"range or shape of {self.name}")
        check(self.start <= self.stop <= math.prod(self.shape), f"{self.start}:{self.stop} of {self.name} {self.shape}")


Lengths = dict[tuple[str, str], int]
"""Elements by kind and dtype."""


def span_of(piece: Piece, lengths: Lengths, offset: int | None = None) -> Span:
    """Where a piece goes: to `offset` of its array, or behind the elements that it has (`lengths`), which grow then."""
    dtype = dtype_name(piece.tensor.dtype)
    numel = piece.stop - piece.start
    assert piece.tensor.shape == (numel,), f"{piece.name}: {piece.tensor.shape}"
    if offset is None:
        offset = lengths.get((piece.kind, dtype), 0)
        lengths[piece.kind, dtype] = offset + numel
    return Span(
        name=piece.name,
        kind=piece.kind,
        start=piece.start,
        stop=piece.stop,
        shape=tuple(piece.shape),
        dtype=dtype,
        offset=offset,
    )


@dataclass(frozen=True, kw_only=True)
class Index:
    """What one rank wrote."""

    arrays: dict[tuple[str, str], ArrayLayout]
    """By kind and dtype."""
    spans: list[Span]

    def __post_init__(self) -> None:
        for span in self.spans:
            array = self.arrays.get((span.kind, span.dtype))
            held = array.length if array else 0
            check(span.offset + span.stop - span.start <= held, f"{span.name} reaches past {span.kind}.{span.dtype}")

    def dumps(self) -> bytes:
        """Made once: a snapshot every step would do little else in Python."""
        return self._content

    @cached_property
    def _content(self) -> bytes:
        arrays = [asdict(array) for array in self.arrays.values()]
        return json.dumps({"arrays": arrays, "pieces": [asdict(span) for span in self.spans]}, indent=1).encode()

    @classmethod
    def loads(cls, content: bytes) -> "Index":
        """ValueError where `content` is no index."""
        try:
            tree = json.loads(content)
            arrays = [ArrayLayout(**entry) for entry in tree["arrays"]]
            spans = [Span(**entry | {"shape": tuple(entry["shape"])}) for entry in tree["pieces"]]
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not an index: {error!r}") from error
        return cls(arrays={(array.kind, array.dtype): array for array in arrays}, spans=spans)


def natural(*numbers: Any) -> bool:
    """Whether all are integers from 0 on."""
    return all(type(number) is int and number >= 0 for number in numbers)


def check(good: object, what: str) -> None:
    """ValueError where it is not good."""
    if not good:
        raise ValueError(f"malformed: {what}")
