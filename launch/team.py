"""The worker actors of a job, as the driver sees them: assembled, started, watched, ended.

The ranks train on their own; the driver polls rank 0 for events and waits for an end. When one rank fails, the others
hang in a collective: they get `GRACE_S` to report a better cause than a broken connection, and are then killed.
"""

import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ray
import ray.cloudpickle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError

from launch import __version__, names
from launch.checks import Crew
from launch.options import LaunchOptions
from launch.watchdog import Watchdog, Watched, kill_culprits
from launch.worker import Assignment, Event, Failed, Failure, bootstrap
from trainer.job import Job
from trainer.run import run_path

GRACE_S = 5.0
POLL_S = 0.5
LOOPBACK = "127.0.0.1"


class Team:
    """One actor a rank. Leaving the context ends them all."""

    def __init__(self, crew: Crew, places: list[dict[str, Any]], options: LaunchOptions) -> None:
        self._crew, self._options = crew, options
        self._deadline = time.monotonic() + options.start_timeout_s
        self._stop_reason: str | None = None
        self._nodes = ["?"] * crew.workers
        self._pids = [0] * crew.workers
        actor: Any = ray.remote(concurrency_groups={"events": 1, "control": 1})(bootstrap())  # type: ignore[call-overload]
        self._actors = [actor.options(**place).remote() for place in places]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def start(self, job: Job, overrides: tuple[str, ...]) -> None:
        """Assemble the ranks in one process group and let them train. ValueError when one cannot take part in time."""
        ray.cloudpickle.register_pickle_by_value(names)  # the check of the names cannot be imported by name
        entered = [actor.enter.remote(names.find_fault, __version__, os.getcwd()) for actor in self._actors]
        loaded = [
            actor.load.remote(self._crew.device, self._options.threads, self._crew.per_node) for actor in self._actors
        ]  # queued behind: the imports start without a word from here
        for rank, place in enumerate(self._gather(entered, "start")):
            if place["fault"]:
                raise ValueError(place["fault"])
            self._nodes[rank], self._pids[rank] = place["node"], place["pid"]
        self._gather(loaded, "import torch")
        self._join(job, overrides)
        self._running = {actor.train.remote(): rank for rank, actor in enumerate(self._actors)}
        logs = run_path(job).resolve() / "logs"
        watched = [
            Watched(rank=rank, actor=actor, node=self._nodes[rank], pid=self._pids[rank], log=logs / f"rank-{rank}.log")
            for rank, actor in enumerate(self._actors)
        ]
        self._watchdog = Watchdog(watched, self._options.hang_timeout_s, self._options.collective_timeout_s)

    def _join(self, job: Job, overrides: tuple[str, ...]) -> None:
        addresses = [LOOPBACK] * self._crew.workers if self._crew.nodes == 1 else self._nodes
        timeout_s = self._options.collective_timeout_s
        [port] = self._gather([self._actors[0].listen.remote(addresses[0], timeout_s)], "open a port")
        joined = [
            actor.join.remote(
                Assignment(
                    job=job,
                    device=self._crew.device,
                    overrides=overrides,
                    rank=rank,
                    world=self._crew.workers,
                    host=addresses[0],
                    port=port,
                    address=addresses[rank],
                    collective_timeout_s=timeout_s,
                )
            )
            for rank, actor in enumerate(self._actors)
        ]
        for rank, failure in enumerate(self._gather(joined, "join the process group")):
            if failure is not None:
                raise ValueError(
                    f"rank {rank} on node {self._nodes[rank]} cannot join the process group: {failure.cause}"
                )

    def _gather(self, calls: list[Any], doing: str) -> list[Any]:
        """The results of one call per rank, within ``launch.start_timeout_s`` of the beginning."""
        pending = calls
        while pending:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            late = time.monotonic() > self._deadline
            for rank, call in enumerate(calls):
                where = f"rank {rank} on node {self._nodes[rank]}"
                if call in pending and late:
                    raise ValueError(
                        f"{where} did not {doing} within launch.start_timeout_s={self._options.start_timeout_s:g}"
                    )
                if call in ready:
                    failure = self._failure(call, rank)
                    if failure:
                        raise RuntimeError(f"{where} did not {doing}: {failure.cause}\n{failure.trace}")
        return list(ray.get(calls))

    def request_stop(self, reason: str) -> None:
        """Called by a signal handler, so it only leaves a note for `watch`."""
        self._stop_reason = reason

    def watch(self, show: Callable[[Event], None]) -> dict[str, Any] | Failed:
        """Show events until the ranks end; what rank 0 returned, or the failure that caused the end."""
        failures: dict[int, Failure] = {}
        results: dict[int, dict[str, Any]] = {}
        give_up = float("inf")
        poll = self._poll(POLL_S)
        while self._running and time.monotonic() < give_up:
            ready, _ = ray.wait([poll, *self._running], timeout=POLL_S)
            self._pass_on_stop()
            if hang := self._watchdog.look():
                kill_culprits(hang)
                return hang.failed
            if poll in ready:
                poll = self._show(poll, show)
            for call in [call for call in ready if call in self._running]:
                rank = self._running.pop(call)
                outcome = self._failure(call, rank) or ray.get(call)
                if isinstance(outcome, Failure):
                    failures[rank] = outcome
                    give_up = min(give_up, time.monotonic() + GRACE_S) if outcome.symptom else 0.0
                else:
                    results[rank] = outcome
        self._show(poll, show)
        self._show(self._poll(0), show)
        if not failures:
            return results[0]
        rank = min(failures, key=lambda rank: (failures[rank].symptom, rank))
        return Failed(rank=rank, node=self._nodes[rank], failure=failures[rank])

    def _pass_on_stop(self) -> None:
        if self._stop_reason is None:
            return
        for actor in self._actors:
            actor.request_stop.options(concurrency_group="control").remote(self._stop_reason)
        self._stop_reason = None

    def _poll(self, wait_s: float) -> Any:
        return self._actors[0].events.options(concurrency_group="events").remote(wait_s)

    def _show(self, poll: Any, show: Callable[[Event], None]) -> Any:
        """Show what a poll of rank 0 brought, and begin the next."""
        try:
            for event in ray.get(poll, timeout=GRACE_S):
                show(event)
        except (RayError, GetTimeoutError):
            time.sleep(POLL_S)  # rank 0 is gone: its call to train says how
        return self._poll(POLL_S)

    def _failure(self, call: Any, rank: int) -> Failure | None:
        """Why a call that is ready has no result."""
        try:
            ray.get(call)
            return None
        except RayTaskError as error:
            return Failure(cause=str(error.cause), trace=str(error))
        except RayActorError as error:
            return Failure(cause=f"its process (pid {self._pids[rank]}) died: {_exit_reason(error)}")


def _exit_reason(error: RayActorError) -> str:
    """Ray's own words on how a process ended, without the advice around them."""
    if not isinstance(error, ActorDiedError):
        return str(error).splitlines()[0]
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text
    known, guess, _ = detail.partition("Some common causes include")
    return known + "It was killed (kill -9, or out of memory) or it crashed." if guess else known
