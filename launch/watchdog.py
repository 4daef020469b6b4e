"""Notices a rank that does not move, and says which one it is, where it stands and who waits for it.

The ranks beat as they go (`trainer/pulse.py`); the driver asks each for its last beat through its actor's ``control``
threads, which answer while the training thread works or waits. Two things are a hang:

- **silence**: a process that does not answer, whatever it was at: it is stopped, or one of its threads keeps the
  interpreter to itself;
- **standing still**: a rank whose last beat is older than what it does may take.

Both are found within ``launch.hang_timeout_s``: it counts from two looks before (`Limits.still_s`), as one may have
been made just before, and in another all are asked how they stand. A silent process is looked at on its node, where a
worker of Ray has to start for that: the node is asked when half the time is over. Reading the data, computing and
updating may take that long each; what is done for the first time (it may compile kernels), saving a checkpoint and the
end, the longer of that and ``launch.collective_timeout_s``, which the others would not outwait anyway; opening the
corpus and building the model, any time.

[Note: the culprit] When one rank stands still, soon all do: they wait for it in a collective. So when the first limit
is passed all are looked at, and the culprit is, in this order: who does not answer; who has not entered a collective
that others are in; who is in no collective while others are; who is furthest behind in its beats. Ranks that are alike
in all of that are not told apart, and the report says so.

After the user or the machine has asked for a stop, little time is left: ``launch.hang_timeout_s`` then gives way to a
few of the run's usual steps (`Limits.stopping`), and ``launch.collective_timeout_s`` stays.

The driver's main thread does all; nothing here blocks but `look` once a limit was passed, for a look's time and
`ANSWER_S` at most.
"""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.nodes import ask_node, kill_process, process_state
from launch.worker import Failure
from trainer.pulse import DEFAULT_GROUP, Beat, Look

ANSWER_S = 3.0
"""How long a rank has to answer once something is wrong."""
STOP_STEPS, STOP_S = 5, 10.0
"""After a stop was asked for, what has stood still for so many usual steps, and so long at least, hangs."""
DUMP_S = 1.0
"""How long `faulthandler` has to write a silent process's stack into its log."""


@dataclass(kw_only=True)
class Watched:
    """A rank, as the watchdog knows it."""

    rank: int
    actor: Any
    node: str
    """Address of its node, for people."""
    pid: int
    log: Path | None = None
    """Where its process writes the stacks that `faulthandler` is asked for."""
    node_id: str
    beat: Beat = field(default_factory=Beat)
    moved_at_s: float = 0.0
    answered_at_s: float = 0.0
    asked_at_s: float = 0.0
    call: Any = None
    seeing: Callable[[float], tuple[str, str]] | None = None
    """Waits for what is seen of its process on its node, which is asked once it has been silent for a while."""
    gone: bool = False
    """Its process has ended: others find out why."""


@dataclass(frozen=True)
class Limits:
    """How long a rank may stand still. hang_timeout_s: 0 for ever; long_s: for what may take longer, see above."""

    hang_timeout_s: float
    long_s: float
    asked: str = ""
    """What the first is for people; empty: what the user set it to."""

    def stopping(self, step_s: float) -> "Limits":
        """After a stop was asked for. step_s: what a step takes."""
        limit_s = max(STOP_S, STOP_STEPS * step_s)
        if not 0 < limit_s < self.hang_timeout_s:
            return self
        return Limits(limit_s, max(self.hang_timeout_s, self.long_s), f"({limit_s:g} s, as a stop was asked for)")

    @property
    def every_s(self) -> float:
        """Between two looks; ``inf``: none is needed."""
        return min(5.0, max(0.1, self.hang_timeout_s / 10)) if self.hang_timeout_s else float("inf")

    @property
    def still_s(self) -> float:
        """After which a rank that stands still, or is silent, is looked at; so that it is found in `hang_timeout_s`."""
        return max(self.hang_timeout_s / 2, self.hang_timeout_s - 2 * self.every_s)

    def of(self, beat: Beat) -> float:
        """Seconds that what `beat` says may take."""
        return {"usual": self.still_s, "long": max(self.still_s, self.long_s), "none": float("inf")}[beat.limit]

    def __str__(self) -> str:
        return self.asked or f"(launch.hang_timeout_s={self.hang_timeout_s:g})"


def stands_still(rank: int, look: Look, limits: Limits) -> Failure:
    """The hang of a rank that answers, and that nobody waits for."""
    cause = f"a hang: it stands still in {look.beat} for {look.age_s:.1f} s{_waits(look)} {limits}"
    return Failure(cause=cause, trace=f"stack of rank {rank}:\n{look.stack}", kind="hang")


class Watchdog:
    """Watches one start of a team."""

    def __init__(self, watched: Sequence[Watched], limits: Limits) -> None:
        import ray

        self._ray: Any = ray
        self._watched = list(watched)
        self.limits = limits
        now = time.monotonic()
        for each in self._watched:
            each.moved_at_s = each.answered_at_s = now

    def look(self) -> dict[int, Failure]:
        """Take what was answered and ask again where it is time. Once a limit is passed, the culprits by rank, with
        what was found; their processes still live."""
        if self.limits.every_s == float("inf"):
            return {}
        self._collect(0)
        now = time.monotonic()
        for each in self._watched:
            if each.call is None and not each.gone and now - each.asked_at_s >= self.limits.every_s:
                each.asked_at_s = now
                each.call = each.actor.pulse.options(concurrency_group="control").remote()
            if each.seeing is None and not each.gone and now - each.answered_at_s > self.limits.still_s / 2:
                each.seeing = ask_node(each.node_id, see_process, each.pid, each.log)
        late = [each for each in self._watched if not each.gone and self._is_late(each, now)]
        return self._examine() if late else {}

    def _is_late(self, each: Watched, now: float) -> bool:
        return self._is_silent(each, now) or now - each.moved_at_s > self.limits.of(each.beat)

    def _is_silent(self, each: Watched, now: float) -> bool:
        return now - each.answered_at_s > self.limits.still_s

    def _collect(self, wait_s: float) -> None:
        calls = {each.call: each for each in self._watched if each.call is not None}
        if not calls:
            return
        ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=wait_s)
        for call in ready:
            each, now = calls[call], time.monotonic()
            each.call = None
            try:
                each.beat, age_s = self._ray.get(call)
            except self._ray.exceptions.RayError:
                each.gone = True
                continue
            each.answered_at_s, each.moved_at_s, each.seeing = now, now - age_s, None

    # ------------------------------------------------------------------------------------------------ what is found

    def _examine(self) -> dict[int, Failure]:
        """Look at all ranks; nothing where it was a hiccup of the driver, and all have moved meanwhile."""
        self._collect(min(1.0, self.limits.every_s))
        now = time.monotonic()
        alive = [each for each in self._watched if not each.gone]
        if not any(self._is_late(each, now) for each in alive):
            return {}
        asked = [each for each in alive if not self._is_silent(each, now)]
        calls = {each.actor.look.options(concurrency_group="control").remote(): each for each in asked}
        ready = self._ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER_S)[0] if calls else []
        looks: dict[int, Look] = {}
        for call in ready:
            with suppress(self._ray.exceptions.RayError):
                looks[calls[call].rank] = self._ray.get(call)
        if any(each.gone for each in self._watched):
            return {}  # a process has ended: that is the cause, and its call says so
        culprits = [each for each in alive if each.rank not in looks] or find_culprits(alive, looks)
        return self._report(alive, culprits, looks, now)

    def _report(
        self, alive: list[Watched], culprits: list[Watched], looks: dict[int, Look], now: float
    ) -> dict[int, Failure]:
        named = culprits or alive
        first = min(named, key=lambda each: (each.moved_at_s, each.rank))
        still_s = now - (first.moved_at_s if first.rank in looks else first.answered_at_s)
        others = [each for each in alive if each not in named]
        where = f"{first.beat} for {now - first.moved_at_s:.1f} s"
        if first.rank in looks:
            what, trace = f"it stands still in {where}{_waits(looks[first.rank])}", looks[first.rank].stack
        else:
            state, trace = self._see_process(first)
            what = (
                f"it has not answered for {still_s:.1f} s, last seen in {where}; its process (pid {first.pid}) {state}"
            )
        if not culprits:
            what += "; all ranks stand alike, so that none can be named"
        elif len(culprits) > 1:
            what += f"; so do ranks {', '.join(str(each.rank) for each in culprits if each is not first)}"
        waiting = [f"rank {each.rank} in {_seen(looks[each.rank])}" for each in others if each.rank in looks]
        if waiting:
            what += f"; waiting for it: {', '.join(waiting[:8])}" + (" …" if len(waiting) > 8 else "")
        trace = f"stack of rank {first.rank}:\n{trace}" if trace else ""
        for each in others[:1]:
            if each.rank in looks:
                trace += f"stack of rank {each.rank}, which waits:\n{looks[each.rank].stack}"
        failure = Failure(cause=f"a hang: {what} {self.limits}", trace=trace, kind="hang")
        return {each.rank: failure for each in culprits or [first]}

    def _see_process(self, each: Watched) -> tuple[str, str]:
        """The state of a process that does not answer, in words, and its stack where it can still write one."""
        try:
            seeing = each.seeing or ask_node(each.node_id, see_process, each.pid, each.log)
            return seeing(10 + DUMP_S)
        except Exception as error:  # whatever keeps the node from telling, the hang is to be reported
            return f"cannot be seen ({type(error).__name__})", ""


def find_culprits(alive: Sequence[Watched], looks: dict[int, Look]) -> list[Watched]:
    """Who keeps the others waiting, where all answer; see [Note: the culprit]. Empty: they cannot be told apart."""
    absent = [each for each in alive if _is_missed(each.rank, looks)]
    outside = [each for each in alive if not looks[each.rank].waits]
    for some in (absent, outside):
        if some and len(some) < len(alive):
            return _furthest_behind(some, looks)
    behind = _furthest_behind(list(alive), looks)
    return behind if len(behind) < len(alive) or len(alive) == 1 else []


def _is_missed(rank: int, looks: dict[int, Look]) -> bool:
    """Whether others are in a collective of one of its groups that `rank` has not entered."""
    entered = looks[rank].entered
    waits = (wait for other, look in looks.items() if other != rank for wait in look.waits)
    # of a group that it has never used, it may not be a member
    return any(wait.seq > entered.get(wait.group, 0 if wait.group == DEFAULT_GROUP else wait.seq) for wait in waits)


def _furthest_behind(some: list[Watched], looks: dict[int, Look]) -> list[Watched]:
    least = min(looks[each.rank].beat.number for each in some)
    return [each for each in some if looks[each.rank].beat.number == least]


def _waits(look: Look) -> str:
    return f", in {look.waits[0]}" if look.waits else ""


def _seen(look: Look) -> str:
    return str(look.waits[0]) if look.waits else f"{look.beat} for {look.age_s:.1f} s"


def see_process(pid: int, log: Path | None) -> tuple[str, str]:
    """On its node: the state of a process, and its stack, which `faulthandler` writes into `log` when it is asked."""
    state = process_state(pid)
    if "stopped" in state or "debugger" in state or "gone" in state or "ended" in state:
        return f"{state}: its stack cannot be taken", ""
    if log is None or not log.exists():
        return state, ""
    before = log.stat().st_size
    if not kill_process(pid, signal.SIGUSR1):
        return "is gone", ""
    deadline = time.monotonic() + DUMP_S
    while time.monotonic() < deadline:
        time.sleep(0.05)
        with log.open("rb") as file:
            file.seek(before)
            if text := file.read().decode("utf-8", "replace"):
                return state, text
    return f"{state}: it has not written its stack", ""
