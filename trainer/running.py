"""A step that has been issued, and may still be computed: on a GPU the host runs ahead of what it has told to do."""

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
    issue_s: float
    """What the host spent on it; the device may have taken longer."""
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
    return host, torch.cuda.current_stream().record_event()
