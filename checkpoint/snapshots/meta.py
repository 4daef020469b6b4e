"""What lies beside a version in its slot: the plan it was made under, and the headers of the node's n fragments."""

import json
import struct
from typing import Any

from checkpoint.snapshots.fragment import PIECE_BYTES, FragmentHeader
from checkpoint.snapshots.roster import Plan

_SIZE = struct.Struct("<I")


def dump_meta(plan: Plan, label: str, headers: list[FragmentHeader]) -> bytes:
    parts = [json.dumps({"plan": plan.tree(), "label": label}).encode(), *(header.dumps() for header in headers)]
    return b"".join(_SIZE.pack(len(part)) + part for part in parts)


def load_meta(meta: bytes) -> tuple[Plan, str, list[bytes]]:
    """Plan, label, and the headers as they are: a damaged one costs its fragment alone. ValueError for no meta."""
    parts, start = [], 0
    while start < len(meta):
        (size,) = _SIZE.unpack_from(meta, start)
        parts.append(meta[start + _SIZE.size :][:size])
        start += _SIZE.size + size
    tree: dict[str, Any] = json.loads(parts[0])
    return Plan.of(tree["plan"]), str(tree["label"]), parts[1:]


def meta_bytes(plan: Plan, label: str) -> int:
    """Room for the meta of a version under `plan`."""
    layout = plan.layout(plan.place(label)[0])
    header = 128 + 4 * -(-layout.chunk_bytes // PIECE_BYTES)
    return 1024 + len(json.dumps(plan.tree())) + layout.n * header
