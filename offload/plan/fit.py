"""Where each request lies: dynamic storage allocation, offline.

Given who wants how much from when to when, give each an offset so that no two wanted at once share a byte, and the
whole is small. The most bytes wanted at one time is a lower bound; best fit in several orders reaches it on most
steps of a model, in milliseconds. Where it does not, a mixed-integer program (`offload.plan.program`) looks for less.
The result is never worse than best fit, and `Placement.solver` says what was tried and why no more.

The problem is NP-hard (Garey and Johnson, SR2). Source: arXiv 2407.12117, memory planning as a MIP; best fit over
orders as in arXiv 1804.10001.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload.plan.program import improve
from offload.plan.requests import Request, check_fits, load_bytes, rounded

ALIGN = 512
"""Bytes; what CUDA's allocator aligns to, and enough for every kernel's vector loads."""


@dataclass(frozen=True)
class Placement:
    offsets: tuple[int, ...]
    """Bytes, in the order of the requests; multiples of ``align``."""
    size_bytes: int
    """Of the memory that holds them all."""
    lower_bound_bytes: int
    """No placement of these requests takes less."""
    align: int
    solver: str
    """What found it, and why nothing better was looked for."""

    @property
    def proven(self) -> bool:
        """Whether it is the smallest."""
        return self.size_bytes == self.lower_bound_bytes

    @property
    def waste(self) -> float:
        """How far above the lower bound it is, as a fraction of that."""
        return self.size_bytes / self.lower_bound_bytes - 1 if self.lower_bound_bytes else 0.0


def place(
    requests: Sequence[Request], *, align: int = ALIGN, time_limit_s: float = 5.0, gap: float = 0.0, rounds: int = 100
) -> Placement:
    """Offsets for `requests`, none of those wanted at once overlapping.

    Each takes its size rounded up to `align` bytes. Looking ends once the size is at most ``1 + gap`` times the lower
    bound, or after `time_limit_s`. `rounds` is how often best fit is tried again with the requests that lay highest
    put first. The same requests give the same placement unless the time limit cut it short, which `solver` says.

    ValueError for options out of range, and for two requests of one name.
    """
    _check(requests, align, time_limit_s, gap, rounds)
    deadline = time.monotonic() + time_limit_s
    sizes = np.array([rounded(r.size_bytes, align) // align for r in requests], dtype=np.int64)
    bound = load_bytes(requests, align) // align
    enough = int(bound * (1 + gap))
    fit = _BestFit(requests, sizes)
    offsets, solver = fit.search(enough, rounds, deadline)
    if fit.height(offsets) > enough:
        better, bound, outcome = improve(offsets, sizes, fit.neighbours, bound, gap, deadline)
        solver = f"{'MIP' if better is not None else solver}; {outcome}"
        offsets = offsets if better is None else better
    placement = Placement(
        tuple(int(o) * align for o in offsets), fit.height(offsets) * align, bound * align, align, solver
    )
    check_fits(requests, placement.offsets, placement.size_bytes)
    return placement


class _BestFit:
    """Requests put one after the other into the smallest hole, or the lowest, that is free during their life."""

    def __init__(self, requests: Sequence[Request], sizes: NDArray[np.int64]) -> None:
        self.sizes = sizes
        self.first = np.array([r.first for r in requests], dtype=np.int64)
        self.last = np.array([r.last for r in requests], dtype=np.int64)
        self.neighbours = [
            np.nonzero((self.first <= last) & (self.last >= first))[0].astype(np.int32)
            for first, last in zip(self.first, self.last, strict=True)
        ]
        """Of each request those wanted at some step of its life, itself among them."""

    def search(self, enough: int, rounds: int, deadline: float) -> tuple[NDArray[np.int64], str]:
        """The lowest offsets found, in units of the alignment, and how. At least one order is tried."""
        life = self.last - self.first + 1
        keys: dict[str, tuple[NDArray[np.int64], ...]] = {
            "size": (-self.sizes, -life),
            "life": (-life, -self.sizes),
            "area": (-self.sizes * life, self.first),
            "start": (self.first, -life),
            "end": (-self.last, -life),
        }
        best, best_order, how = None, None, ""
        for name, key in keys.items():
            order = np.lexsort(key[::-1])
            for lowest in (False, True):
                if best is not None and (self.height(best) <= enough or time.monotonic() > deadline):
                    return best, how
                offsets = self.put(order, lowest)
                if best is None or self.height(offsets) < self.height(best):
                    best, best_order, best_lowest = offsets, order, lowest
                    how = f"{'lowest' if lowest else 'best'} fit by {name}"
        assert best is not None and best_order is not None
        order, offsets = best_order, best
        for number in range(rounds):
            if self.height(best) <= enough or time.monotonic() > deadline:
                break
            order = self._highest_first(order, offsets)
            offsets = self.put(order, best_lowest)
            if self.height(offsets) < self.height(best):
                best, how = offsets, f"{'lowest' if best_lowest else 'best'} fit, highest first {number + 1} times"
        return best, how

    def put(self, order: NDArray[np.int64], lowest: bool) -> NDArray[np.int64]:
        offsets = np.full(len(self.sizes), -1, dtype=np.int64)
        for i in order:
            near = self.neighbours[i]
            near = near[offsets[near] >= 0]
            starts = offsets[near]
            by_start = np.argsort(starts, kind="stable")
            starts = starts[by_start]
            ends = np.maximum.accumulate(np.concatenate(([0], starts + self.sizes[near][by_start])))
            holes = starts - ends[:-1]
            fitting = np.nonzero(holes >= self.sizes[i])[0]
            if not len(fitting):
                offsets[i] = ends[-1]
            else:
                offsets[i] = ends[fitting[0] if lowest else fitting[np.argmin(holes[fitting])]]
        return offsets

    def height(self, offsets: NDArray[np.int64]) -> int:
        return int((offsets + self.sizes).max(initial=0))

    def _highest_first(self, order: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """`order` with those that reach the top moved half way to the front (squeaky wheel, Joslin, Clements 1999)."""
        top = (offsets + self.sizes)[order] == self.height(offsets)
        rank = np.arange(len(order), dtype=np.float64)
        rank[top] = np.floor(rank[top] / 2) - 0.5
        moved: NDArray[np.int64] = order[np.argsort(rank, kind="stable")]
        return moved


def _check(requests: Sequence[Request], align: int, time_limit_s: float, gap: float, rounds: int) -> None:
    if align < 1:
        raise ValueError(f"align={align} bytes: must be 1 or more")
    if time_limit_s < 0 or gap < 0 or rounds < 0:
        raise ValueError(f"time_limit_s={time_limit_s}, gap={gap}, rounds={rounds}: none may be negative")
    seen: set[str] = set()
    for r in requests:
        if r.name in seen:
            raise ValueError(f"two requests are called {r.name!r}: each must have its own name")
        seen.add(r.name)
