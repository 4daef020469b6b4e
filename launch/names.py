"""Whether the import names of Atoll's packages lead to Atoll.

The names are generic (``trainer``, ``launch``, …), so another installed package or a file in the user's folder can take
one, on the driver or on a worker, where Ray puts the driver's folder on ``sys.path``.

Invariant: stdlib alone, and nothing of ours is imported here: workers get these functions pickled by value and run
them before their first import of ours.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

PACKAGES = ("trainer", "offload", "parallel", "checkpoint", "conf", "launch")


def find_fault(where: str = "") -> str | None:
    """One sentence that says which name leads elsewhere, or that Atoll is not installed; None when all is well.

    `where` names the machine in it, for example ``" on node 10.0.0.2"``.
    """
    places = {name: _place(importlib.util.find_spec(name)) for name in PACKAGES}
    roots = [place.parent for place in places.values() if place and (place.parent / "launch" / "names.py").is_file()]
    if not roots:
        return f"atoll is not installed{where}, for {sys.executable}: install the driver's version there"
    for name, place in places.items():
        if place is None:
            return f"the package {name!r} of atoll is missing{where} from {roots[0]}: install atoll again"
        if place.parent != roots[0]:
            return (
                f"the name {name!r} leads{where} to {place}, but atoll needs its own package of that name "
                f"in {roots[0]}: rename that one, or take its folder off PYTHONPATH, or start atoll from another folder"
            )
    return None


def _place(spec: ModuleSpec | None) -> Path | None:
    """The folder of a package, or the file of a module."""
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin or spec.name).resolve()
