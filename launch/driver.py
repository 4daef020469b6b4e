"""Runs a job: in this process when it has one worker, else on Ray, under a `Supervisor` that recovers from failures.

The driver holds no state of the training. Threads: all here is the main thread's. The first SIGINT or SIGTERM asks
every rank to stop after the step at hand, which the ranks agree on among themselves; the second ends everything at
once. A SIGTERM is always answered by a resumable end: at once where no training has begun, so that nothing can be lost,
and at the latest after ``launch.notice_s``.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import psutil

from launch import EXIT_RESUMABLE
from launch.address import probe
from launch.checks import Crew, check, find_crew
from launch.config import Config
from launch.devices import this_machine
from launch.failures import FILE, FailureRecord
from launch.report import show_failures
from launch.worker import Failed, Failure, check_device, take_cores
from trainer import timeline
from trainer.run import check_free, run_path

if TYPE_CHECKING:
    from launch.policy import ScalingPolicy

EXIT_KILLED = 130
REPEATED_S = 5.0
"""What sends a SIGTERM may send it to the process and to its group, as `timeout` does: within so long it is one. Python
takes a signal when it comes back from C, which may be a step later."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a run ended."""

    status: str
    """``finished``, ``stopped`` (resumable), ``failed`` or ``killed``."""
    exit_code: int
    result: dict[str, Any] = field(default_factory=dict)
    """What rank 0's `Trainer.train` returned."""


class Killed(BaseException):
    """A second signal, the first one before training began, or the end of the time that a SIGTERM leaves."""

    def __init__(self, status: str, why: str) -> None:
        """status: of the report; ``stopped`` where it is the answer to one SIGTERM."""
        self.status, self.why = status, why


class Stop:
    """What the user or the machine asked for."""

    def __init__(self, notice_s: float) -> None:
        self._notice_s = notice_s
        self.signal: signal.Signals | None = None
        self.act: Callable[[str], None] | None = None
        """How to stop gently, by `gently`; None while nothing runs that could."""
        self.ended: Killed | None = None
        """What was raised to end at once."""
        self._sigterm_at = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            before, self._sigterm_at = self._sigterm_at, time.monotonic()
            if self._sigterm_at - before < REPEATED_S:
                return
        if number == signal.SIGALRM:
            self._end("stopped", f"launch.notice_s={self._notice_s:g} is over")
        if self.signal is not None or self.act is None:
            gentle = self.signal is None and number == signal.SIGTERM
            self._end("stopped" if gentle else "killed", "ended before training began" if gentle else "ended at once")
        self.signal = signal.Signals(number)
        if self.signal == signal.SIGTERM and self._notice_s:
            signal.setitimer(signal.ITIMER_REAL, self._notice_s)
        # not print(): the signal may have come in the middle of one
        os.write(2, f"\natoll: {self.signal.name}: stopping after this step; once more ends it at once\n".encode())
        self.act(self.signal.name)

    def _end(self, status: str, why: str) -> NoReturn:
        self.ended = Killed(status, why)
        raise self.ended

    def gently(self, act: Callable[[str], None]) -> None:
        """From now on the first signal calls `act`. Raises what one before has raised, where that was swallowed: Python
        drops what a handler raises while C code that cannot fail, as some of Ray's, calls it back."""
        self.check()
        self.act = act

    def check(self) -> None:
        """Raise what has been raised before, and swallowed."""
        if self.ended is not None:
            raise self.ended

    @contextmanager
    def listening(self) -> Iterator[None]:
        previous = self.listen()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def listen(self) -> dict[signal.Signals, Any]:
        """Take the signals, again after Ray has: its own handler ends the driver. Returns the handlers before."""
        return {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}


def run(config: Config, overrides: Sequence[str] = (), stream: TextIO | None = None) -> Report:
    """Train as `config` says and show the progress on `stream` (standard output).

    Raises ValueError for what cannot work: before anything is started, or before the first step where only a worker can
    find it. For the main thread: it listens to signals.
    """
    stop = Stop(config.launch.notice_s)
    with stop.listening():
        try:
            return _run(config, tuple(overrides), stream or sys.stdout, stop)
        except (Killed, SystemError):  # the latter where Killed was raised in the middle of Ray's C code
            if (end := stop.ended) is None:
                raise
            print(f"atoll: {end.why}; the same command goes on from the last checkpoint", file=sys.stderr)
            return Report(status=end.status, exit_code=EXIT_RESUMABLE if end.status == "stopped" else EXIT_KILLED)


def _run(config: Config, overrides: tuple[str, ...], stream: TextIO, stop: Stop) -> Report:
    check_free(config)
    if config.launch.address is not None:
        probe(config.launch.address, config.launch.start_timeout_s)
        from launch.cluster import connected, machines

        with connected(config.launch, None):
            crew = find_crew(config.launch, machines())
            return _run_on_ray(_scaling(config, crew, stream), overrides, stream, stop)
    crew = find_crew(config.launch, [this_machine()])
    if crew.workers == 1:
        return _run_here(_settled(config, crew, stream), crew, overrides, stream, stop)
    from launch.cluster import connected

    scaling = _scaling(config, crew, stream)
    with connected(config.launch, crew):
        return _run_on_ray(scaling, overrides, stream, stop)


def _scaling(config: Config, crew: Crew, stream: TextIO) -> "ScalingPolicy":
    from launch.policy import ScalingPolicy

    scaling = ScalingPolicy(config, crew, lambda config, crew: _settled(config, crew, stream))
    scaling.config(crew)
    return scaling


def _settled(config: Config, crew: Crew, stream: TextIO) -> Config:
    """Checked, and with a placement where ``parallel=auto`` asks for one."""
    if config.parallel.placement == "auto":
        from launch.plan import settle

        config, why = settle(config, crew.workers)
        print(f"parallel=auto: {why}", file=stream)
    return check(config, crew)


def _run_here(config: Config, crew: Crew, overrides: tuple[str, ...], stream: TextIO, stop: Stop) -> Report:
    threads = take_cores(crew.device, config.launch.threads, 1)
    import torch

    from launch.alone import WHERE, Alone
    from trainer.progress import Progress

    torch.set_num_threads(threads)
    show = Progress(config.train.steps, stream, config.logger.every_steps).show
    check_device(crew.device)
    alone = Alone(config, overrides, show)
    stop.gently(alone.request_stop)
    with _noted(config):
        outcome = alone.run()
        _show_failures(config, stream)
    return _failed(0, WHERE, outcome) if isinstance(outcome, Failure) else _ended(outcome, stop)


def _run_on_ray(scaling: "ScalingPolicy", overrides: tuple[str, ...], stream: TextIO, stop: Stop) -> Report:
    from launch.supervisor import Supervisor
    from trainer.progress import Progress

    stop.listen()
    stop.check()
    config = scaling.config(scaling.wanted)
    show = Progress(config.train.steps, stream, config.logger.every_steps).show
    with _noted(config), Supervisor(scaling, config.launch, overrides, show) as supervisor:
        outcome = supervisor.run(lambda: stop.gently(supervisor.request_stop))
        _show_failures(config, stream)
        if isinstance(outcome, Failed):
            return _failed(outcome.rank, f"node {outcome.node}", outcome.failure)
        return _ended(outcome, stop)


def _show_failures(config: Config, stream: TextIO) -> None:
    if failures := FailureRecord.read(run_path(config) / FILE):
        print(show_failures(failures), file=stream)


@contextmanager
def _noted(config: Config) -> Iterator[None]:
    """Inside, the run's timeline says that this process is at it; its start counts from when the process was made."""
    folder = run_path(config)
    timeline.note(folder, "start", at=psutil.Process().create_time(), pid=os.getpid())
    try:
        yield
    finally:
        timeline.note(folder, "exit")


def _ended(result: dict[str, Any], stop: Stop) -> Report:
    if result.get("unsaved") and stop.signal != signal.SIGTERM:
        return Report(status="failed", exit_code=1, result=result)
    if result.get("status") != "stopped":
        return Report(status="finished", exit_code=0, result=result)
    return Report(status="stopped", exit_code=EXIT_RESUMABLE if stop.signal == signal.SIGTERM else 0, result=result)


def _failed(rank: int, where: str, failure: Failure) -> Report:
    print(
        f"atoll: rank {rank} on {where}: {failure.cause}\n{failure.trace}",
        file=sys.stderr,
        end="" if failure.trace else "\n",
    )
    return Report(status="failed", exit_code=1)
