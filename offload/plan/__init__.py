"""The memory plan: what a step allocates is recorded, and each tensor is given its place before the first step.

The names are imported on first use, so that placing does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload.plan.bilevel import Head, Layer, StepPlan, flat_requests, plan_step, record_head, record_layer
    from offload.plan.fit import Placement, place
    from offload.plan.record import Recorder
    from offload.plan.requests import GrowingRequest, Request, check_fits, growing, load_bytes, timeline

_HOMES = {
    "GrowingRequest": "requests",
    "Head": "bilevel",
    "Layer": "bilevel",
    "Placement": "fit",
    "Recorder": "record",
    "Request": "requests",
    "StepPlan": "bilevel",
    "check_fits": "requests",
    "flat_requests": "bilevel",
    "growing": "requests",
    "load_bytes": "requests",
    "place": "fit",
    "plan_step": "bilevel",
    "record_head": "bilevel",
    "record_layer": "bilevel",
    "timeline": "requests",
}

__all__ = [
    "GrowingRequest",
    "Head",
    "Layer",
    "Placement",
    "Recorder",
    "Request",
    "StepPlan",
    "check_fits",
    "flat_requests",
    "growing",
    "load_bytes",
    "place",
    "plan_step",
    "record_head",
    "record_layer",
    "timeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'offload.plan' has no attribute {name!r}")
    return getattr(import_module(f"offload.plan.{_HOMES[name]}"), name)
