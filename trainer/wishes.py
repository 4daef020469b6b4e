"""What ranks are asked to do before the run is done: to stop, or to pause. One is asked, all do it at the same step.

The wish of one travels with each step's loss (`here`, `heard`); where there is no step it is asked for (`ask`).
"""

from trainer.build import Rank

PERSIST = 1 << 16
"""More than there are ranks."""


class Wishes:
    """Of the rank at `where`. `wish_stop` and `wish_pause` may be called from any thread."""

    def __init__(self, where: Rank) -> None:
        self._where = where
        self._stop = ""
        self._pause = 0
        self.stopping = False
        """All know that one was asked to stop."""
        self._pauses = 0.0

    def wish_stop(self, reason: str) -> None:
        self._stop = reason

    def wish_pause(self, *, persist: bool) -> None:
        self._pause = PERSIST if persist else 1

    @property
    def here(self) -> tuple[int, int]:
        """Of this rank alone: whether to stop, and to pause."""
        return int(bool(self._stop)), self._pause

    def heard(self, stops: float, pauses: float) -> None:
        """The sum of all ranks' wishes."""
        self.stopping = self.stopping or stops > 0
        self._pauses = self._pauses or pauses

    def ask(self, *, pause: bool = True) -> bool:
        """Whether any rank is to stop or, if that is asked too, to pause. Collective."""
        stops, pauses = self.here
        self.heard(*self._where.sum(stops, pauses if pause else 0))
        return self.stopping or self.pausing

    @property
    def pausing(self) -> bool:
        return self._pauses > 0

    @property
    def persisting(self) -> bool:
        """Whether the pause is to leave a checkpoint."""
        return self._pauses >= PERSIST

    @property
    def reason(self) -> str:
        """Why it stops, as far as this rank knows."""
        return self._stop or "another rank was asked to stop"
