"""The ranks of one start, as the driver sees them: assembled, watched, and, after a failure, got out of their group.

The ranks train on their own; the driver polls rank 0 for events and waits for an end. When one rank fails its ring
neighbours fail too, at once, and the others wait in a collective: all are told to get out, and each then says why it
ended.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from checkpoint.snapshots.roster import Roster
from launch.checks import Crew
from launch.member import Member, failure_of
from launch.options import LaunchOptions
from launch.places import Node, gone
from launch.watchdog import Limits, Watchdog, Watched
from launch.worker import Assignment, Event, Failure, log_file
from trainer.job import Job
from trainer.run import LeftBehind, run_path

LEAVE_S = 5.0
POLL_S = 0.1
PROBE_EVERY_S = 0.5
LONG_POLL_S = 0.5
LOOPBACK = "127.0.0.1"


class Team:
    """One member a rank. `failures` says, by rank, who has failed and why."""

    def __init__(self, members: Sequence[Member], crew: Crew, options: LaunchOptions) -> None:
        assert len(members) == crew.workers
        self.members, self.crew, self._options = list(members), crew, options
        self.nodes: list[Node] = list(dict.fromkeys(member.node for member in members))
        self.lost: set[Node] = set()
        """Nodes that did not answer. Asking a machine that is switched off takes seconds, so it is not asked again."""
        self.unfit: set[Node] = set()
        """Nodes on which a process could not be made ready."""
        self.failures: dict[int, Failure] = {}
        self.results: dict[int, dict[str, Any]] = {}
        self._running: dict[Any, int] = {}
        self.loaded_at = time.time()
        """Unix time at which all had imported what they need."""
        self._deadline = time.monotonic() + options.start_timeout_s
        self._poll: Any = None
        self._probed = 0.0

    # ------------------------------------------------------------------------------------------------ start

    def assemble(
        self,
        job: Job,
        overrides: tuple[str, ...],
        roster: Callable[[Callable[[], bool]], Roster | None],
        left_behind: LeftBehind,
    ) -> bool:
        """Assemble the ranks in one process group and let them train; False where some have failed.

        roster: gives the nodes' snapshot processes, asked while the workers import; what it is given says whether all
        nodes are there. left_behind: see `Trainer`.
        """
        entered = self._gather([member.entered for member in self.members], "start")
        if entered is None:
            return False
        for rank, (member, place) in enumerate(zip(self.members, entered, strict=True)):
            member.pid = place["pid"]
            member.devices = member.devices or place["devices"]
            if place["fault"]:
                self.failures[rank] = Failure(cause=place["fault"], user=True)
                self.unfit.add(member.node)
        try:
            known = None if self.failures else roster(self._all_there)
        except ValueError as error:
            self._probed = 0.0
            if self._all_there():
                self.failures[0] = Failure(cause=str(error), user=True)
        if self.failures:
            return False
        if self._gather([member.loaded for member in self.members], "import torch") is None:
            self.unfit = {self.members[rank].node for rank, one in self.failures.items() if one.kind == "error"}
            return False
        self.loaded_at = time.time()
        return self._join(job, overrides, known, left_behind)

    def _join(self, job: Job, overrides: tuple[str, ...], roster: Roster | None, left_behind: LeftBehind) -> bool:
        addresses = [LOOPBACK if self.crew.nodes == 1 else member.node.address for member in self.members]
        timeout_s = self._options.collective_timeout_s
        ports = self._gather([self.members[0].actor.listen.remote(addresses[0], timeout_s)], "open a port")
        if ports is None:
            return False
        calls = [
            member.actor.join.remote(
                Assignment(
                    job=job,
                    device=self.crew.device,
                    overrides=overrides,
                    rank=rank,
                    world=self.crew.workers,
                    host=addresses[0],
                    port=ports[0],
                    address=addresses[rank],
                    collective_timeout_s=timeout_s,
                    devices=member.devices,
                    roster=roster,
                    left_behind=left_behind,
                )
            )
            for rank, member in enumerate(self.members)
        ]
        self._running = {call: rank for rank, call in enumerate(calls)}
        joined = self._gather(calls, "join the process group")
        if joined is None:
            return False
        self._running = {member.actor.train.remote(): rank for rank, member in enumerate(self.members)}
        self._poll = self._events(LONG_POLL_S)
        self._watchdog = self._watch_over(run_path(job).resolve() / "logs")
        return True

    def _watch_over(self, logs: Path) -> Watchdog:
        watched = [
            Watched(
                rank=rank, actor=m.actor, node=m.node.address, node_id=m.node.id, pid=m.pid, log=log_file(logs, rank)
            )
            for rank, m in enumerate(self.members)
        ]
        return Watchdog(watched, Limits(self._options.hang_timeout_s, self._options.collective_timeout_s))

    def _gather(self, calls: list[Any], doing: str) -> list[Any] | None:
        """The results of one call per rank, within ``launch.start_timeout_s`` of the beginning; None, and `failures`
        say why, where there are not all."""
        pending = calls
        while pending:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            late = time.monotonic() > self._deadline
            for rank, call in enumerate(calls):
                if call in pending and late:
                    limit = f"launch.start_timeout_s={self._options.start_timeout_s:g}"
                    self.failures[rank] = Failure(cause=f"it did not {doing} within {limit}", kind="hang")
                elif call in ready:
                    failure = failure_of(call, self.members[rank]) or ray.get(call)
                    if isinstance(failure, Failure):
                        self._running.pop(call, None)
                        self.failures[rank] = failure
            self._probe()
            if self.failures:
                return None
        return list(ray.get(calls))

    # ------------------------------------------------------------------------------------------------ running

    def watch(self, show: Callable[[Event], None], tick: Callable[[], None]) -> bool:
        """Show events until all ranks have ended (True) or one has failed (False). `tick` is called in between."""
        while self._running and not self.failures:
            ready = _ready([self._poll, *self._running])
            tick()
            if self._poll in ready:
                self._show(self._poll, show)
                self._poll = self._events(LONG_POLL_S)
            self._collect(ready)
            self._probe()
            if self._running and not self.failures and (found := self._watchdog.look()):
                self.failures |= found
                self._running = {call: rank for call, rank in self._running.items() if rank not in found}
        return not self.failures

    def request_stop(self, reason: str, step_s: float) -> None:
        """step_s: what a step has taken; 0: none was made, and what the ranks are at may take as long as ever."""
        if step_s:
            self._watchdog.limits = self._watchdog.limits.stopping(step_s)
        for member in self.members:
            member.control("request_stop", reason)

    def request_pause(self, *, persist: bool = False) -> None:
        for member in self.members:
            member.control("request_pause", persist)

    def leave(self, show: Callable[[Event], None]) -> None:
        """Get all ranks out of the process group, and show what rank 0 still has to tell. Then each rank has a result
        or a failure; who could not be got out within `LEAVE_S` is to be killed."""
        for rank in self._running.values():
            self.members[rank].control("abandon")
        deadline = time.monotonic() + LEAVE_S
        while self._running and time.monotonic() < deadline:
            self._collect(_ready(list(self._running)))
            self._probe()
        for rank in self._running.values():
            cause = f"it did not stop within {LEAVE_S:g} s after others had failed, and was killed"
            self.failures[rank] = Failure(cause=cause, kind="hang")
        self._running, self._probed = {}, 0.0
        self._probe()
        self.last_events(show)

    def last_events(self, show: Callable[[Event], None]) -> None:
        if self._poll is not None and not self._is_gone(0):
            self._show(self._poll, show)
            self._show(self._events(0), show)
        self._poll = None

    def _collect(self, ready: list[Any]) -> None:
        for call in [call for call in ready if call in self._running]:
            rank = self._running.pop(call)
            outcome = failure_of(call, self.members[rank]) or ray.get(call)
            if isinstance(outcome, Failure):
                self.failures[rank] = outcome
            elif outcome is not None:
                self.results[rank] = outcome

    def _probe(self) -> None:
        """Ask the nodes themselves whether they are there: Ray takes its time."""
        if time.monotonic() < self._probed + PROBE_EVERY_S:
            return
        self._probed = time.monotonic()
        new = gone([node for node in self.nodes if node not in self.lost])
        self.lost |= new
        for rank, member in enumerate(self.members):
            if member.node in new:
                self.failures[rank] = Failure(cause=f"node {member.node} died", kind="node")
                self._running = {call: other for call, other in self._running.items() if other != rank}

    def _all_there(self) -> bool:
        self._probe()
        return not self.failures

    def _is_gone(self, rank: int) -> bool:
        return rank in self.failures and self.failures[rank].kind in ("process", "node", "preemption", "hang")

    def _events(self, wait_s: float) -> Any:
        return self.members[0].actor.events.options(concurrency_group="events").remote(wait_s)

    def _show(self, poll: Any, show: Callable[[Event], None]) -> None:
        try:
            for event in ray.get(poll, timeout=LEAVE_S):
                show(event)
        except (RayError, GetTimeoutError):
            pass  # rank 0 is gone: its call to train says how


def _ready(calls: list[Any]) -> list[Any]:
    """All that have come to an end, after a wait of up to `POLL_S` for the first. (Ray returns no more than it is asked
    for, in order: what is always ready would hide the rest.)"""
    ray.wait(calls, timeout=POLL_S)
    ready: list[Any] = ray.wait(calls, num_returns=len(calls), timeout=0)[0]
    return ready
