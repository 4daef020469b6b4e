"""How much of each block's activations to swap: as much as hides behind its forward and fits in host memory.

With S the bytes of a block's input, of what attention saves and of the matrix products, B the link's bytes a second and
n blocks, α is the largest for which

    (S_in + S_attn + α S_rest) / B <= T_fwd   and   n (S_in + S_attn + α S_rest) <= M_host

It is one α for all blocks, from the sums of their times and bytes: what one block takes longer than it was measured to
another takes less, and slots of host memory are equal, so that the largest α alone would set their size.

Source: arXiv 2407.12117, section 4.2. What GPU memory is left over keeps blocks first (arXiv 2403.06504): the last
ones, whose backward comes first, so that what they keep is soonest free again.

[Note: drives behind host memory] Where host memory has slots for s of n blocks, D bytes a second of a drive hide behind
the forward if the first n - s blocks' are written when the last blocks want their slots, two of which are taken by what
is on its way: (n - s)(S_in + S_attn) / D <= (n - 2) T_fwd. In the backward the same holds for what is read, beside
T_bwd, twice T_fwd or more. Then α = 0 for all, else host memory alone is used.

[Note: what swapping takes on the device] Products on their way out, of two blocks at a time, and the regions of two
buffers that they come back to, one of which stands for what recomputing would take anyway: beside α = 0, at most
2 S_rest more. Where that is not left over, nothing but inputs and attention is swapped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEP = 64
"""α is a multiple of 1 / STEP, or a breath of noise in a time would have host memory made anew."""


@dataclass(frozen=True)
class Choice:
    """What becomes of one block's activations."""

    mode: str
    """``keep``, ``swap``, ``input`` (alone is swapped) or ``recompute``; ``stream`` and ``stream_input`` are of all."""
    alpha: float = 0.0
    """Of ``swap``: the fraction of tokens whose matrix products are swapped."""

    @property
    def leaves(self) -> bool:
        """Whether the block takes a slot of host memory."""
        return self.mode in ("swap", "input")


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """What a block's forward takes and leaves."""

    forward_s: float
    input_bytes: int
    attention_bytes: int
    rest_bytes: int
    """Of the matrix products, for all tokens."""
    kept_bytes: int | None = None
    """What it saves if it keeps everything. None: the sum of the three."""

    @property
    def least_bytes(self) -> int:
        return self.input_bytes + self.attention_bytes

    @property
    def all_bytes(self) -> int:
        return self.least_bytes + self.rest_bytes if self.kept_bytes is None else self.kept_bytes


@dataclass(frozen=True)
class DriveRoom:
    """Drives that slots may go on to."""

    size_bytes: float
    bytes_per_s: float
    """Written, and half of what is read."""


def choose_alpha(costs: Sequence[BlockCost], *, link_bytes_per_s: float, host_bytes: float) -> float:
    """The α of blocks that may take `host_bytes` of host memory together, of which α = 0 takes no more.

    Where α = 0 does not hide behind the forward it is 0 all the same: the copy is waited for.
    """
    least, rest = sum(cost.least_bytes for cost in costs), sum(cost.rest_bytes for cost in costs)
    if not rest:
        return 1.0
    hides = (link_bytes_per_s * sum(cost.forward_s for cost in costs) - least) / rest
    fits = (host_bytes / len(costs) - _largest(costs)) / max(cost.rest_bytes for cost in costs)
    return min(1.0, max(0.0, min(hides, fits)))


def _largest(costs: Sequence[BlockCost]) -> int:
    """Bytes of a slot for α = 0."""
    return max((cost.least_bytes for cost in costs), default=0)


def fit(costs: Sequence[BlockCost], host_bytes: float) -> list[Choice]:
    """What host memory has room for, of blocks that are not kept: input and attention of all, or else their inputs
    alone, since slots are equal; where not even those of all fit the last blocks are recomputed, whose memory on the
    device is soonest free again."""
    if len(costs) * _largest(costs) <= host_bytes:
        return [Choice("swap")] * len(costs)
    largest = max(cost.input_bytes for cost in costs)
    num = len(costs) if not largest else min(len(costs), int(host_bytes // largest))
    return [Choice("input")] * num + [Choice("recompute")] * (len(costs) - num)


def hides(costs: Sequence[BlockCost], host_bytes: float, drives: DriveRoom) -> bool:
    """Whether input and attention of the blocks that host memory does not hold may go on to drives, see
    [Note: drives behind host memory]."""
    largest, n = _largest(costs), len(costs)
    num = int(min(n, host_bytes // max(1, largest)))
    on_drives = (n - num) * largest
    behind_s = (n - 2) / n * sum(cost.forward_s for cost in costs)
    return num >= 2 and on_drives <= min(drives.size_bytes, behind_s * drives.bytes_per_s)


def choose(
    costs: Sequence[BlockCost],
    *,
    link_bytes_per_s: float,
    host_bytes: int | None = None,
    gpu_bytes: int | None = None,
    keep_last: int = 2,
    keep_most: int | None = None,
    drives: DriveRoom | None = None,
    step: int = STEP,
) -> list[Choice]:
    """A choice for each block, in the order of the forward.

    host_bytes: for all of them together; None: no limit. gpu_bytes: what is left over on the device beside α = 0
    ([Note: what swapping takes on the device]), where as many of the last blocks as fit keep everything; None: not
    known, none but `keep_last` do, and α is not bound by it. keep_most: no more do than so many. The others are as host
    memory has room for, see `fit`, or with `drives` behind it where they hide. step: α is a multiple of 1 / step.
    ValueError for rates or sizes below zero.
    """
    if link_bytes_per_s <= 0 or min(gpu_bytes or 0, host_bytes or 0, keep_last) < 0:
        raise ValueError(
            f"link_bytes_per_s={link_bytes_per_s}, host_bytes={host_bytes}, gpu_bytes={gpu_bytes}, "
            f"keep_last={keep_last}: the rate must be above 0, the others 0 or more"
        )
    transit = 2 * max((cost.rest_bytes for cost in costs), default=0)
    room = gpu_bytes is None or gpu_bytes >= transit
    spare = 0 if gpu_bytes is None else gpu_bytes - transit if room else gpu_bytes
    kept = 0
    for cost in reversed(costs):
        spare -= cost.all_bytes
        if kept >= keep_last and spare < 0 or kept == keep_most:
            break
        kept += 1
    away = costs[: len(costs) - kept]
    most = math.inf if host_bytes is None else host_bytes
    choices = fit(away, most)
    if drives and away and choices[-1].mode != "swap" and hides(away, most, drives):
        return [Choice("swap")] * len(away) + [Choice("keep")] * kept
    if room and choices and choices[0].mode == "swap":
        alpha = choose_alpha(away, link_bytes_per_s=link_bytes_per_s, host_bytes=most)
        choices = [Choice("swap", math.floor(step * alpha) / step)] * len(away)
    return choices + [Choice("keep")] * kept
