"""One worker, in the driver's process. It needs no supervisor: what ends it ends the driver, and the same command goes
on from what is in memory or storage. Three things it does for itself: it goes back from bad numbers and from a damaged
checkpoint, and it watches itself. A hang, which it cannot get out of, ends the process, with a word on where it stood.

Threads: training is the main thread's. The watchdog's only reads, until it finds a hang. A thread that keeps the
interpreter to itself keeps the watchdog from it too.
"""

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from launch import EXIT_RESUMABLE
from launch.config import Config
from launch.leave import free_memory
from launch.ledger import Ledger
from launch.policy import FailurePolicy, by_itself
from launch.watchdog import Limits, stands_still
from launch.worker import Event, Failure, describe
from trainer import timeline
from trainer.loop import Trainer
from trainer.pulse import Beat
from trainer.run import LeftBehind, run_path

WHERE = "this machine"
TELL_S = 2.0
"""How long the last word may take: who reads it may be what hangs."""


class Alone:
    """Trains the job of `config`; `show` gets its events."""

    def __init__(self, config: Config, overrides: tuple[str, ...], show: Callable[[Event], None]) -> None:
        self._job, self._overrides, self._show = config.job(), overrides, show
        self._folder = run_path(self._job)
        self._limits = Limits(config.launch.hang_timeout_s, config.launch.collective_timeout_s)
        self._budget = FailurePolicy(config.launch.max_failures, config.launch.max_preemptions, config.train.rewinds)
        self._ledger = Ledger(self._folder, lambda text: show({"type": "message", "text": text}))
        self._trainer: Trainer | None = None
        self._stop_reason = ""

    def request_stop(self, reason: str) -> None:
        """From a signal handler; also between two starts."""
        self._stop_reason = reason
        if step_s := self._ledger.watched.step_s:
            self._limits = self._limits.stopping(step_s)
        if self._trainer is not None:
            self._trainer.request_stop(reason)

    def run(self) -> dict[str, Any] | Failure:
        """What the trainer returned, or the failure that was not recovered from. ValueError for what cannot work,
        before the first step."""
        left_behind = LeftBehind()
        while True:
            result = self._train(left_behind)
            if isinstance(result, Failure) and result.user and not self._ledger.watched.moved:
                raise ValueError(result.cause)
            if not isinstance(result, Failure):
                return result
            result = by_itself(result, self._job.run.resume)
            if result.next_batch is None and result.good_step is None:
                return result
            if why := self._go_back(result):
                return replace(result, cause=f"{result.cause} (not recovered from: {why})")
            self._job = replace(self._job, run=replace(self._job.run, resume="auto"))
            if result.next_batch is not None:
                left_behind = LeftBehind(steps_after=self._ledger.watched.step, batches_before=result.next_batch)
            else:
                left_behind = replace(left_behind, steps_after=result.good_step)

    def _train(self, left_behind: LeftBehind) -> dict[str, Any] | Failure:
        self._ledger.watched.starts()
        try:
            self._trainer = Trainer(self._job, emit=self._see, overrides=self._overrides, left_behind=left_behind)
            if self._stop_reason:
                self._trainer.request_stop(self._stop_reason)
            with self._watched(self._trainer):
                return self._trainer.train()
        except Exception as error:
            failure = describe(error)
            traceback.clear_frames(error.__traceback__)  # they hold the model
            return failure
        finally:
            self._trainer = None

    def _go_back(self, failure: Failure) -> str:
        """Why not to start again; empty: do, memory is free."""
        watched, now = self._ledger.watched, time.time()
        watched.times = {"found": now}
        self._ledger.failed(failure, 0, WHERE, 1, found_s=now - watched.last_sign)
        if why := self._budget.give_up(failure, watched.step, watched.moved):
            self._ledger.give_up()
            return why
        self._show({"type": "message", "text": failure.cause})
        free_memory()
        return ""

    def _see(self, event: Event) -> None:
        self._ledger.see(event, 1)
        self._show(event)

    # ------------------------------------------------------------------------------------------------ the watchdog

    @contextmanager
    def _watched(self, trainer: Trainer) -> Iterator[None]:
        """Inside, a hang ends the process."""
        ended = threading.Event()
        if self._limits.every_s < float("inf"):
            threading.Thread(target=self._watch, args=(trainer, ended), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, trainer: Trainer, ended: threading.Event) -> None:
        """The time that counts is what this thread has waited itself: a process that was stopped as a whole, and goes
        on, does not hang."""
        last, still_s = Beat(), 0.0
        while not ended.wait(every_s := self._limits.every_s):
            beat, _ = trainer.pulse.read()
            last, still_s = beat, still_s + every_s if beat is last else 0.0
            if still_s >= self._limits.of(beat):
                self._end(stands_still(0, trainer.pulse.look(), self._limits))

    def _end(self, failure: Failure) -> None:
        watched = self._ledger.watched
        watched.times = {"found": time.time()}
        self._ledger.failed(failure, 0, WHERE, 1, found_s=time.time() - watched.last_sign)
        self._ledger.give_up()
        timeline.note(self._folder, "exit")
        text = f"atoll: rank 0 on {WHERE}: {failure.cause}; the same command goes on\n{failure.trace}"
        telling = threading.Thread(target=os.write, args=(2, text.encode()), daemon=True)
        telling.start()
        telling.join(TELL_S)
        os._exit(EXIT_RESUMABLE if self._stop_reason == "SIGTERM" else 1)
