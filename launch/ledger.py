"""What a run has been seen to do, and its failures until they are recovered from or given up: then they are written
down. The supervisor keeps one, and so does the driver of a single worker."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.failures import FILE, FailureRecord, Source
from launch.worker import Event, Failure


@dataclass
class Watched:
    """What the events say of the run."""

    step: int = 0
    """Steps that are done."""
    moved: bool = False
    """Whether one was done since the driver started."""
    stepped: bool = False
    """Whether one was done since this start of the ranks."""
    step_s: float = 0.0
    """What the last of these took; 0: there was none."""
    last_sign: float = field(default_factory=time.time)
    """Unix time of the last event."""
    restored: tuple[Source, int] = ("start", 0)
    """Where the ranks of this start have their state from, and of which step."""
    restored_once: bool = False
    times: dict[str, float] = field(default_factory=dict)
    """Of the last recovery: Unix times of what was reached."""

    def starts(self) -> None:
        """The ranks are about to restore and train."""
        self.restored, self.stepped, self.step_s = ("start", 0), False, 0.0

    def see(self, event: Event) -> None:
        self.last_sign = time.time()
        if event["type"] == "resumed":
            self.restored, self.step = (event["from"], event["step"]), event["step"]
            self.restored_once = True
            self.times["restored"] = self.last_sign
        elif event["type"] == "step":
            self.step, self.moved, self.stepped = event["step"] + 1, True, True
            self.step_s = event["step_s"]

    def breakdown(self) -> str:
        """``out 0.4 s, joined 0.9 s, …``: how long each part of the recovery took, in order."""
        parts, before = [], self.times["found"]
        for name, at in self.times.items():
            if name != "found":
                parts.append(f"{name} {at - before:.2f} s")
            before = at
        return ", ".join(parts)


class Ledger:
    """Of one run. `say` gets what the user should see."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.watched = Watched()
        self._file, self._say = folder / FILE, say
        self._records: list[FailureRecord] = []
        """Of failures that are not recovered from yet."""

    def see(self, event: Event, world: int) -> None:
        """An event of a start of so many ranks. Its first step, or an end before it, ends the recovery."""
        goes_on = event["type"] == "step" or event["type"] == "end" and event["status"] != "paused"
        first = goes_on and not self.watched.stepped
        self.watched.see(event)
        if first:
            self.watched.times["first step"] = self.watched.last_sign
            self._recovered(world)

    def failed(self, failure: Failure, rank: int | None, node: str, world: int, *, found_s: float) -> None:
        self._records.append(
            FailureRecord(
                time=self.watched.times["found"],
                cause=failure.kind,
                what=failure.cause,
                rank=rank,
                node=node,
                found_s=found_s,
                restored_from=None,
                step=self.watched.step,
                resumed_step=None,
                steps_lost=None,
                recover_s=None,
                world_before=world,
                world_after=None,
            )
        )

    def ended(self) -> None:
        """The ranks have stopped. They may have gone on for some steps after what was found, as with a preemption."""
        self._records = [replace(record, step=max(record.step, self.watched.step)) for record in self._records]

    def give_up(self) -> None:
        """What has failed since the last step is not recovered from."""
        for record in self._records:
            record.append(self._file)
        self._records = []

    def _recovered(self, world: int) -> None:
        (source, resumed), at = self.watched.restored, self.watched.last_sign
        for record in self._records:
            replace(
                record,
                restored_from=source,
                resumed_step=resumed,
                steps_lost=record.step - resumed,
                recover_s=at - record.time,
                world_after=world,
            ).append(self._file)
        if self._records:
            whole_s = at - self.watched.times["found"]
            self._say(f"recovered in {whole_s:.2f} s from {source}, step {resumed}: {self.watched.breakdown()}")
        self._records = []
