"""What is done about a loss or a gradient that is no number, or a loss that is far from those before it.

With ``train.on_bad_numbers=fail`` a bad step ends the training once it is reported, which costs nothing. With ``skip``
every step is judged before its update: the host waits for the loss and the gradient norm, and the update of a bad one
does not happen. Weights, moments and the number of updates are then what they would be without that batch. With
``rewind`` a bad step ends this start of the training by a `Rewind`; whoever started it starts it again from the newest
version, with the data after the bad step.

Every rank judges the same numbers and has the same history, which goes into every checkpoint: a run that is resumed
judges the steps after it as it did before.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

from trainer.options import TrainOptions

WINDOW_STEPS = 64
"""Losses that the median is taken over."""
FEWEST_STEPS = 8
"""With fewer before it no loss is called a spike."""
MOST_IN_A_ROW = 16
"""Skipped steps after which something is wrong that skipping does not mend."""


class BadNumbers(FloatingPointError):
    """Training cannot go on with these numbers."""


class Rewind(BadNumbers):
    """Training is to go back to its newest version, all of which are from before these numbers, and on from there with
    the batch `next_batch`: those from there to the bad one are passed over."""

    def __init__(self, why: str, next_batch: int) -> None:
        super().__init__(why)
        self.next_batch = next_batch


class Judge:
    """Judges the steps of one run, in order."""

    def __init__(self, options: TrainOptions) -> None:
        self._options = options
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._in_a_row = 0

    @property
    def skips(self) -> bool:
        return self._options.on_bad_numbers == "skip"

    @property
    def rewinds(self) -> bool:
        return self._options.on_bad_numbers == "rewind"

    def fault(self, loss: float, grad_norm: float) -> str:
        """What is wrong with a step; empty where nothing is, and then its loss counts for those to come.

        BadNumbers after too many in a row.
        """
        found, spike = "", self._options.loss_spike
        if not math.isfinite(loss):
            found = f"its loss is {loss}"
        elif not math.isfinite(grad_norm):
            found = f"its gradient norm is {grad_norm}"
        elif spike is not None and len(self._losses) >= FEWEST_STEPS:
            median = statistics.median(self._losses)
            if loss > spike * median:
                found = (
                    f"its loss {loss:.4g} is over train.loss_spike={spike:g} times the median before it, {median:.4g}"
                )
        if not found:
            self._losses.append(loss)
            self._in_a_row = 0
            return ""
        self._in_a_row += 1
        if self._in_a_row > MOST_IN_A_ROW:
            raise BadNumbers(
                f"{self._in_a_row} steps in a row are bad: {found}; lower optimizer.lr or set train.clip_norm"
            )
        return found

    def dump(self) -> dict[str, object]:
        """What has to be kept with a checkpoint, as JSON."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row}

    def load(self, losses: Sequence[float], in_a_row: int) -> None:
        self._losses.extend(losses)
        self._in_a_row = in_a_row
