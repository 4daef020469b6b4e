"""Runs by name, and whether one is being trained. No torch, no Ray."""

import difflib
import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from launch.failures import TEAM_FILE


def parse(args: list[str], allowed: tuple[str, ...], usage: str) -> dict[str, str]:
    """``key=value`` words as a dict; ValueError that shows `usage` for anything else."""
    given: dict[str, str] = {}
    for arg in args:
        key, equals, value = arg.lstrip("-").partition("=")
        if key not in allowed or not equals or not value:
            near = difflib.get_close_matches(key, allowed, 1)
            meant = f"; did you mean {near[0]}=?" if near and key not in allowed else ""
            raise ValueError(f"received {arg}{meant}\n{usage}")
        given[key] = value
    return given


def find_run(root: str, name: str | None) -> Path:
    """The folder of the run; without a name, of the only one there is. ValueError with the names there are."""
    runs = sorted(file.parent.name for file in Path(root).expanduser().glob("*/config.yaml"))
    there = f"run.root={root} holds {', '.join(runs) or 'no run'}"
    if name is None:
        if len(runs) != 1:
            raise ValueError(f"which run? {there}; choose one with run.name=")
        name = runs[0]
    if name not in runs:
        near = difflib.get_close_matches(name, runs, 1)
        raise ValueError(f"run.name={name}: there is no such run{f'; did you mean {near[0]}' if near else ''}; {there}")
    return Path(root).expanduser() / name


def read_team(folder: Path) -> dict[str, Any] | None:
    """Who trains the run now, as ``team.json`` says; None where nobody does, or the driver that wrote it is gone."""
    try:
        team: dict[str, Any] = json.loads((folder / TEAM_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if team["driver_host"] == socket.gethostname() and not psutil.pid_exists(int(team["driver_pid"])):
        return None
    return team


def is_running(folder: Path) -> bool:
    """Whether a process trains in the folder, or a driver is about to."""
    if read_team(folder) is not None:
        return True
    with suppress(OSError):
        file = os.open(folder / "run.lock", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
    return False
