"""What lies where in a checkpoint, and how it is written down. Pure: no storage, no threads.

[Note: the format]
Rank r of the world that wrote keeps all its state in the zarr v3 group ``shards/<r>``: for each kind and dtype one 1-D
array, the concatenation of the rank's pieces. So a chunk has one writer, whatever the placement. ``index.json``
beside the arrays says which range of which parameter lies at which offset. Chunks are what zarr's codecs ``bytes``
(little endian) and ``crc32c`` make: the elements, then their CRC-32C in 4 bytes. zarr has no bfloat16 and float8: they
are stored as unsigned integers of that width, with the attribute ``torch_dtype``.

``COMMIT`` names every other file with its size and CRC-32C, and ends with its own CRC. A chunk's CRC there leaves out
the chunk's own last 4 bytes: the CRC of data followed by its CRC is the same number for all data, and would not see
two chunks that changed places.

A step that is saved again while an older version of it is committed goes to ``step-<step>.1``, ``.2`` …: the highest
that is committed counts, so the older one stays good until then.

Source: zarr v3 core specification, https://zarr-specs.readthedocs.io/en/latest/v3/core/v3.0.html
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import zarr
from zarr.abc.buffer import Buffer
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from checkpoint.crc import crc32c
from checkpoint.folder import PAGE_BYTES
from offload.space import round_up
from offload.state import Piece

FORMAT = 1
COMMIT = "COMMIT"
META = "meta.json"
CRC_BYTES = 4

_STEP = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_KIND = re.compile(r"[A-Za-z0-9_]{1,64}")
_PATH = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.]*/)*[A-Za-z0-9_][A-Za-z0-9_.]*")
_CHUNK = re.compile(r".*/c/\d+")


class DType(NamedTuple):
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


def step_folder(step: int, version: int = 0) -> str:
    return f"step-{step:08d}" + (f".{version}" if version else "")


def step_of(name: str) -> tuple[int, int] | None:
    """Step and version whose folder has this name; None if it is no such folder."""
    match = _STEP.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def chunk_file(array: str, number: int) -> str:
    """Path of a chunk of the array of that name, in the rank's folder."""
    return f"{array}/c/{number}"


def shard_folder(rank: int) -> str:
    return f"shards/{rank:05d}"


def is_chunk(path: str) -> bool:
    return _CHUNK.fullmatch(path) is not None


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One 1-D zarr array: `length` elements (at least one) in chunks of `chunk`, the last one padded with zeros."""

    kind: str
    dtype: str
    length: int
    chunk: int

    def __post_init__(self) -> None:
        _check(isinstance(self.kind, str) and _KIND.fullmatch(self.kind), f"kind {self.kind!r}")
        _check(isinstance(self.dtype, str) and self.dtype in DTYPES, f"dtype {self.dtype!r}")
        _check(
            _natural(self.length, self.chunk) and 1 <= self.chunk <= self.length,
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
        _check(isinstance(self.name, str), f"name {self.name!r}")
        _check(_natural(self.start, self.stop, self.offset, *self.shape), f"range or shape of {self.name}")
        _check(
            self.start <= self.stop <= math.prod(self.shape), f"{self.start}:{self.stop} of {self.name} {self.shape}"
        )


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
            _check(span.offset + span.stop - span.start <= held, f"{span.name} reaches past {span.kind}.{span.dtype}")

    def dumps(self) -> bytes:
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


class Entry(NamedTuple):
    """Size in bytes and CRC-32C of a file; see [Note: the format] for what a chunk's leaves out."""

    size: int
    crc: int


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What the marker says: the checkpoint is complete, and these are its files."""

    step: int
    world: int
    files: dict[str, Entry]

    def dumps(self) -> bytes:
        tree = {"format": FORMAT, "step": self.step, "world": self.world, "files": self.files}
        body = json.dumps(tree, indent=1).encode()
        return body + _seal(body)

    @classmethod
    def loads(cls, content: bytes) -> "Commit":
        """ValueError where `content` is no marker, or not of this format."""
        seal_bytes = len(_seal(b""))
        body = content[:-seal_bytes]
        if content[-seal_bytes:] != _seal(body):
            raise ValueError("its CRC-32C is wrong")
        try:
            tree = json.loads(body)
            if tree["format"] != FORMAT:
                raise ValueError(f"it has format {tree['format']!r}; this version reads format {FORMAT}")
            files = {_relative(path): Entry(size, crc) for path, (size, crc) in tree["files"].items()}
            _check(_natural(tree["step"], tree["world"], *(n for entry in files.values() for n in entry)), "number")
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a commit marker: {error!r}") from error
        return cls(step=tree["step"], world=tree["world"], files=files)


def zarr_metadata(arrays: Iterable[ArrayLayout]) -> dict[str, bytes]:
    """The ``zarr.json`` files, by path, of a group of these arrays."""
    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files))
    for array in arrays:
        group.create_array(
            array.name,
            shape=(array.length,),
            chunks=(array.chunk,),
            dtype=DTYPES[array.dtype].zarr,
            fill_value=0,
            filters=None,
            compressors=[Crc32cCodec()],
            attributes={"torch_dtype": array.dtype},
        )
    return {path: buffer.to_bytes() for path, buffer in files.items()}


def _seal(body: bytes) -> bytes:
    return f"\n{crc32c(body):08x}\n".encode()


def _relative(path: str) -> str:
    # A stranger's marker must not make us read outside the folder: no "..", no root, no hidden file.
    _check(_PATH.fullmatch(path), f"path {path!r}")
    return path


def _natural(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _check(good: object, what: str) -> None:
    if not good:
        raise ValueError(f"malformed: {what}")
