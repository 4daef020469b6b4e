"""Packages that only some data needs: the optional extra ``atoll[hf]``."""

from importlib import import_module
from typing import Any


class MissingExtra(ValueError):
    """An option needs a package that is not installed."""


def need(module: str, override: str) -> Any:
    """Import `module`; MissingExtra names the extra to install, and the `override` that asked for it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{override} needs the package {module} ({error}): pip install 'atoll[hf]'") from error
