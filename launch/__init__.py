"""Where and how a job runs: the command line, Hydra on the driver, Ray and the workers.

Imported lazily: `launch.names` must be able to look before anything else of ours is imported.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.config import Config
    from launch.driver import run
    from launch.options import LaunchOptions

__all__ = ["Config", "LaunchOptions", "run"]
__version__ = "0.1.0"
EXIT_RESUMABLE = 75
"""``EX_TEMPFAIL`` of sysexits.h, "try again": what a batch system's requeue rule can look for."""

_HOMES = {"Config": "launch.config", "LaunchOptions": "launch.options", "run": "launch.driver"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'launch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
