"""Random weights that are a function of the seed, the parameter's name and the element's place alone.

A parameter is drawn in blocks, each from its own generator, so a rank that owns a range draws little more than that
range, and any partition of the model over any number of ranks draws the same numbers. CPU and CUDA generators differ.
"""

import hashlib
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from offload.state import MASTER

_BLOCK = 1 << 20


class RandomRead:
    """An `offload.state.Read`: fp32 on `device`, normal with standard deviation ``std(name)``, 1 where that is None."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        std: Callable[[str], float | None],
        seed: int,
        device: torch.device,
    ) -> None:
        self._sizes = {name: prod(shape) for name, shape in shapes.items()}
        self._std, self._seed, self._device = std, seed, device

    def __call__(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        if kind != MASTER or name not in self._sizes:
            raise KeyError(f"no {kind} of {name}: only weights of the model's parameters are drawn")
        assert 0 <= start <= stop <= self._sizes[name]
        std = self._std(name)
        if std is None:
            return torch.ones(stop - start, device=self._device)
        out = torch.empty(stop - start, device=self._device)
        for first in range(start // _BLOCK * _BLOCK, stop, _BLOCK):
            block = self._block(name, first)
            low, high = max(start, first), min(stop, first + _BLOCK)
            out[low - start : high - start] = block[low - first : high - first]
        return out.mul_(std)

    def _block(self, name: str, first: int) -> Tensor:
        """The whole block, even where less is wanted: a generator's numbers depend on how many are asked for."""
        generator = torch.Generator(self._device).manual_seed(stable_seed(self._seed, name, first))
        size = min(_BLOCK, self._sizes[name] - first)
        return torch.randn(size, generator=generator, device=self._device)


def stable_seed(*parts: object) -> int:
    """63 bits that depend on `parts` alone: the same in every process, unlike ``hash``."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1
