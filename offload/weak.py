"""What autograd may hold of an engine without keeping it alive."""

import weakref
from collections.abc import Callable
from typing import Any

import torch


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, without keeping its object alive, for what autograd holds: a graph's hooks, and those of the thread,
    which a collective takes along. A step that a peer's death has ended leaves both unfinished; what holds them the
    collector cannot see, and they would hold the object and all its memory for good. Compiled blocks call it as it is,
    and do not have it compiled for each unit."""
    found = weakref.WeakMethod(method)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def call(*args: Any) -> Any:
        alive = found()
        assert alive is not None, "a graph is of no use without its engine"
        return alive(*args)

    return call  # type: ignore[no-any-return]
