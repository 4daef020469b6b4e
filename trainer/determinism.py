"""The same bits in every run: kernels that add in one order, and compiled code that is not chosen by timing it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._inductor import config as inductor

SETTINGS: tuple[tuple[Any, str, bool], ...] = (
    (torch.utils.deterministic, "fill_uninitialized_memory", False),  # we read nothing that was not written
    (inductor, "deterministic", True),
)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it, where `wanted`, an operator that has no deterministic kernel raises RuntimeError. Entered before the
    process first uses cuBLAS, which reads its workspace's size then."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    algorithms = torch.are_deterministic_algorithms_enabled()
    known = [setting for setting in SETTINGS if hasattr(*setting[:2])]  # inductor's: from torch 2.10 on
    before = [(module, name, getattr(module, name)) for module, name, _ in known]
    torch.use_deterministic_algorithms(True)
    for module, name, value in known:
        setattr(module, name, value)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms)
        for module, name, value in before:
            setattr(module, name, value)
