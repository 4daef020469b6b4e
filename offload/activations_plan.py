"""How much of each block's activations to swap: as much as hides behind its forward and fits in host memory.

With S the bytes of a block's input, of what attention saves and of the matrix products, B the link's bytes a second and
n blocks, α is the largest for which

    (S_in + S_attn + α S_rest) / B <= T_fwd   and   n (S_in + S_attn + α S_rest) <= M_host

Source: arXiv 2407.12117, section 4.2. What GPU memory is left over keeps blocks first (arXiv 2403.06504): the last
ones, whose backward comes first, so that what they keep is soonest free again.

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
    mode: str
    """``keep``, ``swap`` or ``recompute``."""
    alpha: float = 0.0
    """Of ``swap``: the fraction of tokens whose matrix products are swapped."""


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


def choose_alpha(cost: BlockCost, *, link_bytes_per_s: float, host_bytes: float) -> float | None:
    """The α of one block that may take `host_bytes` of host memory; None where not even α = 0 fits there.

    Where α = 0 does not hide behind the forward it is 0 all the same: the copy is waited for.
    """
    if cost.least_bytes > host_bytes:
        return None
    if not cost.rest_bytes:
        return 1.0
    most = min(link_bytes_per_s * cost.forward_s, host_bytes)
    return min(1.0, max(0.0, (most - cost.least_bytes) / cost.rest_bytes))


def choose(
    costs: Sequence[BlockCost],
    *,
    link_bytes_per_s: float,
    host_bytes: int | None = None,
    gpu_bytes: int | None = None,
    keep_last: int = 2,
) -> list[Choice]:
    """A choice for each block, in the order of the forward.

    host_bytes: for all of them together; None: no limit. gpu_bytes: what is left over on the device beside α = 0
    ([Note: what swapping takes on the device]), where as many of the last blocks as fit keep everything; None: not
    known, none but `keep_last` do, and α is not bound by it. A block whose share of host memory is less than its input
    and attention is recomputed. ValueError for rates or sizes below zero.
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
        if kept >= keep_last and spare < 0:
            break
        kept += 1
    away = costs[: len(costs) - kept]
    choices = []
    left = float("inf") if host_bytes is None else float(host_bytes)
    for number, cost in enumerate(away):
        share = left / (len(away) - number)
        alpha = choose_alpha(cost, link_bytes_per_s=link_bytes_per_s, host_bytes=share)
        if alpha is not None:
            alpha = math.floor(STEP * alpha) / STEP if room else 0.0
        choices.append(Choice("recompute") if alpha is None else Choice("swap", alpha))
        left -= 0 if alpha is None else cost.least_bytes + alpha * cost.rest_bytes
    return choices + [Choice("keep")] * kept
