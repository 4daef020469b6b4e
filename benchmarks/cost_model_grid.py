"""The grid of `cost_model`: its model, its points, and what the cost model is asked about a point on a machine."""

import itertools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks import links  # noqa: E402
from benchmarks.namespaces import _tbf  # noqa: E402
from parallel import Mesh, ParallelOptions, Placement  # noqa: E402
from parallel.planning.cost import Plan  # noqa: E402
from parallel.planning.machine import Machine, Packing  # noqa: E402
from parallel.planning.workload import UnitCost, Workload, aligned  # noqa: E402
from parallel.transport import Transport  # noqa: E402

Row = dict[str, Any]
LEVELS = {"node": 2, "rank": 2}
WIDTH, LAYERS, TOKENS = 384, 6, 32
PLACEMENTS = ("ddp", "zero2", "zero3", "hsdp", "hfsdp")
"""On two levels ``topo`` is ``hfsdp``."""
FREE = ((0, 0, 1), (0, 0, 2), (0, 1, 1), (0, 1, 2), (1, 2, 2))
"""The other P <= G <= O of two levels."""
QUANTIZE = ("none", "outer", "all")
ACCUMULATION = (1, 4)


class Layers(nn.Module):
    """Linear layers, each a unit, and the mean square of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])

    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.layers(x).square().mean()
        return loss


def batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return (torch.randn(TOKENS, WIDTH, generator=generator),)


@dataclass(frozen=True)
class Point:
    """One measured configuration."""

    rate: float
    placement: str
    quantize: str
    accumulation: int
    overlap: bool
    triple: tuple[int, int, int] | None = None
    """P, G, O where ``placement`` is ``free``."""

    @property
    def options(self) -> dict[str, Any]:
        named = {"placement": self.placement, "quantize": self.quantize}
        if self.triple is None:
            return named
        return named | dict(zip(("params", "grads", "optim"), self.triple, strict=True))

    def __str__(self) -> str:
        name = self.placement if self.triple is None else "free" + "".join(map(str, self.triple))
        shown = f"{self.rate:6g} {name:7} {self.quantize:6} x{self.accumulation}"
        return shown + ("" if self.overlap else " overlap off")


def grid(rates: list[float]) -> list[Point]:
    named = itertools.product(rates, PLACEMENTS, QUANTIZE, ACCUMULATION, (True, False))
    free = itertools.product(rates, ("free",), QUANTIZE, ACCUMULATION, (True,), FREE)
    return [*(Point(*point) for point in named), *(Point(*point) for point in free)]


def held_out(point: Point) -> bool:
    """Every third one along the axes of placement and quantization, shifted by accumulation and overlap."""
    place = PLACEMENTS.index(point.placement) if point.triple is None else 2 + FREE.index(point.triple)
    where = place + QUANTIZE.index(point.quantize)
    return (where + ACCUMULATION.index(point.accumulation) + 2 * point.overlap) % 3 == 0


def mesh() -> Mesh:
    return Mesh.of(LEVELS, rank=0, world=math.prod(LEVELS.values()))


def work_of(micro_batches: int, compute_bytes: int = 4, reduce_bytes: int = 4) -> Workload:
    size = WIDTH * WIDTH
    first = UnitCost(  # its input needs no gradient, so its backward has one product and asks for no weights
        name="first", matrices=aligned(size), forward_flops=2.0 * size, backward_flops=2.0 * size,
        gathers_backward=False,
    )  # fmt: skip
    rest = replace(first, name="layer", count=LAYERS - 1, backward_flops=4.0 * size, gathers_backward=True)
    return Workload(
        units=(first, rest), tokens=TOKENS, micro_batches=micro_batches, compute_bytes=compute_bytes,
        reduce_bytes=reduce_bytes, num_parameters=LAYERS,
    )  # fmt: skip


def problem(point: Point) -> tuple[Workload, Plan]:
    """What the cost model is asked about a point."""
    work = replace(work_of(point.accumulation), overlap=point.overlap)
    options = ParallelOptions(**point.options)
    placement = Placement.of(options, len(LEVELS))
    return work, Plan(mesh(), placement, Transport.of(options, mesh(), placement))


def described(rate: float, row: Row) -> Machine:
    """The machine as `links` measured it, but with one bandwidth a link for all collectives, at the least what one rank
    alone gets of it: what one collective does not fill, those that run beside it in a step do. The slow link has its
    bucket, through which the smallest message passed at once: what that took is the latency."""
    machine = Machine.of(row["machine"])
    if machine.backend != "gloo":
        say(f"at {rate:g} Mbit/s `links` described a GPU, the steps ran on CPUs: what they reach is only fitted")
        machine = replace(machine, **CPUS)
        machine = replace(machine, links=tuple(replace(link, latency=1e-4, fits={}) for link in machine.links))
    found = []
    for link, below in zip(machine.links, (LEVELS["rank"], 1), strict=True):
        saved = burst(rate) if link.shared else 0.0
        plain = replace(link, fits={}, bandwidth=max(link.bandwidth, link.alone), burst=saved)
        fits = {kind: replace(fit, bandwidth=plain.rate(kind, below)) for kind, fit in link.fits.items()}
        if link.shared:
            points = row["points"][link.name]
            smallest_s = {kind: max(0.0, points[kind][0][1] - machine.issue_s) for kind in fits}
            steps = {kind: links.ring_steps(kind, points["members"]) for kind in fits}
            fits = {kind: replace(fit, latency=smallest_s[kind] / steps[kind]) for kind, fit in fits.items()}
        found.append(replace(plain, fits=fits))
    return replace(machine, links=tuple(found))


CPUS: dict[str, Any] = {
    "backend": "gloo", "compute": 40e9, "memory_rate": 10e9, "unit_s": 1e-4, "step_s": 1e-3,
    "packing": {
        "quantize_int8": Packing(rate=11e9, call_s=6e-5), "dequantize_int8": Packing(rate=40e9, call_s=2e-5),
        "quantize_int4": Packing(rate=8e9, call_s=7e-5), "dequantize_int4": Packing(rate=11e9, call_s=5e-5),
    },
}  # fmt: skip
"""Of a core, in round numbers: from where a fit starts that knows nothing."""


def burst(rate: float) -> float:
    """Bytes in the bucket of `namespaces`' shaper."""
    words = _tbf(rate).split()
    return float(words[words.index("burst") + 1])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
