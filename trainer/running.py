"""A step that has been issued, and may still be computed: on a GPU the host runs ahead of what it has told to do."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Running:
    """A step that the device may still be computing."""

    step: int
    lr: float
    values: Tensor
    """(4,) fp32 on the host once `ready`: the mean loss, how many ranks were asked to stop, how many to pause (each
    that is to persist counts `trainer.wishes.PERSIST`), the gradient norm."""
    ready: torch.cuda.Event | None
    fault: str
    """Why it was skipped; empty where it was not."""

    def wait(self) -> None:
        """Until the device has computed it."""
        if self.ready:
            self.ready.synchronize()

    def unfit(self) -> str:
        """Why nobody should go on from its state, once the device has computed it; empty where it has numbers, or
        was skipped."""
        self.wait()
        return "" if self.fault or bool(self.values.isfinite().all()) else f"step {self.step} left no numbers"


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """`values` on the host, and the event after which they are there. Reading a CUDA tensor would wait for all that was
    issued since; this waits for what came before alone."""
    if values.device.type == "cpu":
        return values, None
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host, _mark()


class StepClock:
    """Seconds from the end of a step to the end of the next. On a GPU as its own events tell them: the host learns of
    an end late, by as much as it has issued since, which is a whole step where it runs ahead."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """The next step begins now; nothing of the one before is still under way."""
        self._host_s = time.perf_counter()
        self._end = _mark() if self._device.type == "cuda" else None

    def lap(self, done: Running) -> float:
        """Of `done`, which the device has computed; each step once, in their order."""
        if self._end is None or done.ready is None:
            before, self._host_s = self._host_s, time.perf_counter()
            return self._host_s - before
        start, self._end = self._end, done.ready
        return float(start.elapsed_time(done.ready)) / 1e3


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
