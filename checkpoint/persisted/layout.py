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
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import zarr
from zarr.abc.buffer import Buffer
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from checkpoint.crc import crc32c
from checkpoint.index import DTYPES, ArrayLayout, check, natural

FORMAT = 1
COMMIT = "COMMIT"
META = "meta.json"
CRC_BYTES = 4

_STEP = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_PATH = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.]*/)*[A-Za-z0-9_][A-Za-z0-9_.]*")
_CHUNK = re.compile(r".*/c/\d+")


def step_folder(step: int, version: int = 0) -> str:
    return f"step-{step:08d}" + (f".{version}" if version else "")


def step_of(name: str) -> tuple[int, int] | None:
    """Step and version whose folder has this name; None if it is no such folder."""
    match = _STEP.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def shard_folder(rank: int) -> str:
    return f"shards/{rank:05d}"


def is_chunk(path: str) -> bool:
    """Whether a file of a step's folder is a chunk of an array, and so ends with a CRC-32C of its own."""
    return _CHUNK.fullmatch(path) is not None


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
            check(natural(tree["step"], tree["world"], *(n for entry in files.values() for n in entry)), "number")
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
    check(_PATH.fullmatch(path), f"path {path!r}")
    return path
