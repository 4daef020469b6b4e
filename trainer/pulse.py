"""Signs of life of a rank: what its training does now and since when, for a watchdog that reads it from another thread.

One thread beats, as its work moves on: a store of a tuple, under a microsecond. Any thread looks. A rank that waits in
a collective beats no more than one that hangs; who is to blame is told by `waiting`, which asks torch's flight recorder
(on by default, and a store a collective) for the collectives that this rank has entered and not left.
"""

import json
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field

DEFAULT_GROUP = "0"
"""torch's name for the group of all ranks."""
UNLIMITED = ("start", "done")
"""What may take any time: reading a corpus, building a model; and nothing to do."""
LONG = ("checkpoint", "end")
"""What depends on storage, or on a model that writes text."""


@dataclass(frozen=True)
class Beat:
    """What a rank does now."""

    doing: str = "start"
    """``start data compute update report evaluation snapshot checkpoint end done``."""
    step: int = -1
    """Steps done; -1 before it is known."""
    number: int = 0
    """How many beats there were before: of two ranks in step, the one with fewer is behind."""
    first: bool = True
    """Whether the rank does this for the first time, which may compile kernels."""
    since_s: float = 0.0
    """``time.monotonic`` of this process."""

    @property
    def limit(self) -> str:
        """How long it may take: ``none``, ``long``, or ``usual``."""
        return "none" if self.doing in UNLIMITED else "long" if self.first or self.doing in LONG else "usual"

    def __str__(self) -> str:
        words = {"start": "the start", "data": "reading data", "report": "waiting for the device", "end": "the end"}
        return words.get(self.doing, self.doing) + (f" of step {self.step}" if self.step >= 0 else "")


@dataclass(frozen=True, kw_only=True)
class Wait:
    """A collective that a rank has entered and not left."""

    op: str
    group: str
    seq: int
    """Its number in the group, from 1."""
    for_s: float

    def __str__(self) -> str:
        group = "of all ranks" if self.group == DEFAULT_GROUP else f"group {self.group}"
        return f"{self.op} no. {self.seq} ({group}) for {self.for_s:.1f} s"


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is seen of a rank that may hang."""

    beat: Beat
    age_s: float
    """Since the beat."""
    stack: str
    """Of the thread that trains."""
    waits: tuple[Wait, ...]
    """Oldest first."""
    entered: dict[str, int] = field(default_factory=dict)
    """By group, the number of the last collective that this rank has entered."""


class Pulse:
    """Made by the thread that trains."""

    def __init__(self) -> None:
        self._now = Beat(since_s=time.monotonic())
        self._seen: set[str] = set()
        self._thread = threading.get_ident()

    def beat(self, doing: str, step: int) -> None:
        """From the thread that trains: `doing` begins, or goes on with its next part."""
        first = doing not in self._seen
        self._seen.add(doing)
        self._now = Beat(doing, step, self._now.number + 1, first, time.monotonic())

    def read(self) -> tuple[Beat, float]:
        """What the rank does, and for how many seconds it has."""
        now = self._now
        return now, time.monotonic() - now.since_s

    def look(self) -> Look:
        """All there is to see, from another thread than the one that trains."""
        beat, age_s = self.read()
        frame = sys._current_frames().get(self._thread)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        waits, entered = waiting()
        return Look(beat=beat, age_s=age_s, stack=stack, waits=waits, entered=entered)


def waiting() -> tuple[tuple[Wait, ...], dict[str, int]]:
    """The collectives that this process is in, oldest first, and by group the number of the last one it entered.

    Nothing where this torch has no flight recorder for the backend: then stacks alone tell.
    """
    if "torch" not in sys.modules:
        return (), {}
    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]
    except ImportError:
        return (), {}
    dump = json.loads(_dump_fr_trace_json(True, True))
    now = time.time()
    found = [
        Wait(
            op=entry["profiling_name"].partition(":")[2] or entry["profiling_name"],
            group=entry["process_group"][0],
            seq=int(entry["collective_seq_id"]),
            for_s=now - entry["time_created_ns"] / 1e9,
        )
        for entry in dump.get("entries", [])
        if not entry["retired"]
    ]
    status = dump.get("pg_status", {})
    entered = {group: max(0, int(seen["last_enqueued_collective"])) for group, seen in status.items()}
    return tuple(sorted(found, key=lambda wait: -wait.for_s)), entered
