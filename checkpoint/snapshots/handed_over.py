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
    """Of each: how long the training thread waited in `save` and for the next one's place; and before an update for the
    copy that thread, or with state on a GPU its stream, since the thread is ahead of it and may wait for nothing."""
    copy_s: list[float] = field(default_factory=list)
    """Of each, in the background: until all was in the segment, and its checksums were made."""
    node_s: dict[str, float] = field(default_factory=dict)
    """Of the last one, in the node's process: seal, encode, prepare, and CPU time of all."""
    _waits: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def waits(self, reached: torch.cuda.Event, copied: torch.cuda.Event) -> None:
        """The training stream, which has `reached` the update, goes on once the last snapshot is `copied`."""
        self._waits.append((len(self.stall_s) - 1, reached, copied))

    def count(self) -> None:
        """Have in `stall_s` what streams have waited by now."""
        while self._waits and self._waits[0][1].query() and self._waits[0][2].query():
            number, reached, copied = self._waits.pop(0)
            self.stall_s[number] += max(0.0, reached.elapsed_time(copied)) / 1e3


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
    """All copies are done, or on the side stream with `last` behind them; or there are none."""
    last: Mark | None = None
    """Of the copies, once they are issued."""
    copied_bytes: int = 0

    def goes(self, last: Mark, copied_bytes: int) -> None:
        """All is issued."""
        self.last, self.copied_bytes = last, copied_bytes
        self.issued.set()
