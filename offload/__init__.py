"""Where state lives: what names a piece of it, what may leave the device, and what the device says of itself.

The names are imported on first use, so that reading the options does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload.device import DeviceReader, peak_flops
    from offload.options import OffloadOptions
    from offload.state import MASTER, Fill, Piece, Read

_HOMES = {
    "DeviceReader": "device",
    "Fill": "state",
    "MASTER": "state",
    "OffloadOptions": "options",
    "Piece": "state",
    "Read": "state",
    "peak_flops": "device",
}

__all__ = ["MASTER", "DeviceReader", "Fill", "OffloadOptions", "Piece", "Read", "peak_flops"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'offload' has no attribute {name!r}")
    return getattr(import_module(f"offload.{_HOMES[name]}"), name)
