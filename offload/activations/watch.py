"""Standing between a block and its matrix products and attention, and giving it the same random numbers twice."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Watcher = Callable[[str, Sequence[Tensor], Callable[[], Tensor]], Tensor]
"""``watcher(kind, inputs, call)`` returns what `call` would; kind: ``linear`` (input, weight, bias), ``attention``."""
_thread = threading.local()


def intercept(module: nn.Module) -> bool:
    """Have a Linear's product told to the watcher; other modules are left alone. Undone by ``del module.forward``."""
    if type(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        return False
    own: Any = weakref.ref(module)  # held by what it holds, its memory would go only when cycles are looked for

    def forward(input: Tensor) -> Tensor:
        linear = own()
        watcher = getattr(_thread, "watcher", None)
        if watcher is None or input.numel() == 0:
            return nn.Linear.forward(linear, input)
        inputs = [input, linear.weight, *([linear.bias] if linear.bias is not None else [])]
        out: Tensor = watcher("linear", inputs, lambda: nn.Linear.forward(linear, input))
        return out

    module.forward = torch.compiler.disable(forward)
    return True


def told(
    attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """`attention` of these, told to this thread's watcher if there is one."""
    watcher = getattr(_thread, "watcher", None)
    if watcher is None:
        return attention(query, key, value, *args, **kwargs)
    out: Tensor = watcher("attention", (query, key, value), lambda: attention(query, key, value, *args, **kwargs))
    return out


def _stand_in(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    attention = _thread.attention
    if getattr(attention, "tells", False):
        out: Tensor = attention(query, key, value, *args, **kwargs)
        return out
    return told(attention, query, key, value, *args, **kwargs)


_watched_attention = torch.compiler.disable(_stand_in)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of Linears and attention on this thread.

    Models call attention by its name in torch.nn.functional, so that is where ours has to stand meanwhile. It is one
    function for ever, so that blocks compiled while it stands there are not compiled again. What stands there already
    and has the attribute ``tells`` calls `told` itself, with what it makes of query, key and value.
    """
    before, attention = getattr(_thread, "watcher", None), F.scaled_dot_product_attention
    _thread.watcher, _thread.attention = watcher, attention
    F.scaled_dot_product_attention = _watched_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention
        _thread.watcher = before


@contextmanager
def unwatched() -> Iterator[None]:
    """Within it this thread's Linears tell nobody."""
    before, _thread.watcher = getattr(_thread, "watcher", None), None
    try:
        yield
    finally:
        _thread.watcher = before


def product(inputs: Sequence[Tensor], out: Tensor, first_row: int) -> None:
    """Rows `first_row` and following of a Linear's result, into `out` (..., columns), contiguous."""
    x, weight, *bias = inputs
    x, out = x.reshape(-1, x.size(-1))[first_row:], out.view(-1, out.size(-1))[first_row:]
    if bias:
        torch.addmm(bias[0], x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out=out)


def rng_state(device: torch.device) -> tuple[Tensor, ...]:
    """Of the CPU, and of `device`; on the host."""
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


def set_rng_state(state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@contextmanager
def with_rng(state: tuple[Tensor, ...] | None, device: torch.device) -> Iterator[None]:
    """The random numbers of `state`, and afterwards those that were next; None: those that come."""
    if state is None:
        yield
        return
    before = rng_state(device)
    set_rng_state(state)
    try:
        yield
    finally:
        set_rng_state(before)
