"""What a step costs before it runs: bytes, seconds and memory of a model on a machine; and the fastest placement.

The engine imports nothing from here; this reads the engine's mesh, placement and transport. The names are imported on
first use. `calibrate`, `choose` and `simulate` are modules, each with a function of its name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.planning.calibrate import Run
    from parallel.planning.choose import Candidate, Choice
    from parallel.planning.cost import Estimate, Plan, estimate
    from parallel.planning.machine import Fit, Link, Machine, load_machine
    from parallel.planning.simulate import Simulation
    from parallel.planning.workload import UnitCost, Workload

_HOMES = {
    "Candidate": "choose",
    "Choice": "choose",
    "Estimate": "cost",
    "Fit": "machine",
    "Link": "machine",
    "Machine": "machine",
    "Plan": "cost",
    "Run": "calibrate",
    "Simulation": "simulate",
    "UnitCost": "workload",
    "Workload": "workload",
    "estimate": "cost",
    "load_machine": "machine",
}

__all__ = [
    "Candidate",
    "Choice",
    "Estimate",
    "Fit",
    "Link",
    "Machine",
    "Plan",
    "Run",
    "Simulation",
    "UnitCost",
    "Workload",
    "estimate",
    "load_machine",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'parallel.planning' has no attribute {name!r}")
    return getattr(import_module(f"parallel.planning.{_HOMES[name]}"), name)
