"""What ``atoll submit`` was asked for, and what it hands over."""

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

RUNS = "/runs"
"""Where a pod sees the claim."""
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,39}[a-z0-9])?")
"""Kubernetes' names (RFC 1123), short enough for what KubeRay appends."""
OVERRIDES = "ATOLL_OVERRIDES"
"""The variable in which a pod finds the job's overrides, a JSON list."""


@dataclass(frozen=True)
class Target:
    """What was typed before ``--``, and the job's overrides after it, completed."""

    kind: str
    options: argparse.Namespace
    overrides: list[str]


@dataclass(frozen=True)
class Submission:
    """What is written, and the command that then hands it over."""

    file: Path
    text: str
    command: list[str]
    notes: list[str] = field(default_factory=list)


def check_label(option: str, value: str | None) -> None:
    if value is not None and not LABEL.fullmatch(value):
        raise ValueError(f"{option} {value!r}: Kubernetes takes a-z, 0-9 and -, at most 41 characters")
