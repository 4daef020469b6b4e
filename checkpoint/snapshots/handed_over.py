"""A state on its way from the training thread into a slot, and what that has cost."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from checkpoint.crc import Bytes
from checkpoint.index import Index
from checkpoint.snapshots.copying import Mark
from offload.state import Piece


@dataclass
class Stats:
    """What snapshots have cost this rank."""

    taken: int = 0
    state_bytes: int = 0
    copied_bytes: int = 0
    """Of the last one: what had to be copied in host memory or from the device. The rest lay in the segment."""
    stall_s: list[float] = field(default_factory=list)
    """Of each: how long the training thread waited in `save` and `wait_copied`, and for the next one's place."""
    copy_s: list[float] = field(default_factory=list)
    """Of each, in the background: until all was in the segment, and its checksums were made."""
    node_s: dict[str, float] = field(default_factory=dict)
    """Of the last one, in the node's process: seal, encode, prepare, and CPU time of all."""


@dataclass(eq=False)
class HandedOver:
    step: int
    pieces: Iterable[Piece] | Callable[[], Iterable[Piece]]
    index: Index
    rank_state: bytes
    meta: bytes
    after: torch.cuda.Event | None
    fault: Callable[[], str]
    area: Bytes | None = None
    """Where to, where the training thread copies itself."""
    begun: threading.Event = field(default_factory=threading.Event)
    issued: threading.Event = field(default_factory=threading.Event)
    """All copies are done, or on the side stream with their marks behind them."""
    marks: list[Mark] = field(default_factory=list)
    copied_bytes: int = 0
