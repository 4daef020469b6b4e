"""A snapshot process without Ray: started by the first worker on this machine, found again by the next.

It is a process of its own in a session of its own, not a thread, a fork or a child that ends with its parent: whatever
kills a worker leaves it be. On Ray a detached actor runs the same `SnapshotNode` (`checkpoint/snapshots/actors.py`).
Where it listens, and the token, stand in its *door*: a file beside the segments, mode 0600, locked as long as it lives
and a leftover like any other after that (`checkpoint/snapshots/segment_files.py`, [Note: owners and leftovers]).
"""

import json
import logging
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from checkpoint.errors import CheckpointError
from checkpoint.snapshots.format import FORMAT, OTHER_VERSION
from checkpoint.snapshots.node import SnapshotNode
from checkpoint.snapshots.roster import Roster
from checkpoint.snapshots.segment_files import FOLDER, create_locked, open_private, try_lock
from checkpoint.snapshots.wire import NodeAddress, Wire

LOOPBACK = "127.0.0.1"
START_S = 60.0
END_S = 10.0
"""Longest wait for a process to give its memory back."""
KILLED = "it is killed, and what it held is lost"
NICENESS = 10
"""Encoding and sealing take the cores that training leaves idle."""


class Door(NamedTuple):
    """What a living process says of itself."""

    address: NodeAddress
    token: bytes
    format: int
    pid: int = 0
    """0: it is of a version that did not say."""


def local_roster(
    run: bytes, world: int, *, hold_s: float, say: Callable[[str], None], log: str | Path = os.devnull
) -> Roster:
    """All ranks on this machine: the process that is there from an earlier start of this run, else a new one. One of
    another version of Atoll is ended, one that does not answer is killed, and `say` is told. CheckpointError where it
    does not end, or none starts."""
    found = find_process(run, "local")
    if found is None or not _goes_on(run, found, say):
        token = secrets.token_bytes(32)
        found = Door(start_process(run, "local", token, hold_s=hold_s, log=log), token, FORMAT)
    return Roster(run=run, token=found.token, nodes=(found.address,), rank_nodes=(0,) * world)


def _goes_on(run: bytes, door: Door, say: Callable[[str], None]) -> bool:
    """Whether a process can be used further; else it has ended."""
    if door.format != FORMAT:
        say(OTHER_VERSION)
        drop_node(door.address, door.token)
    elif problem := _silence(door):
        if _is_snapshot_process(door.pid):
            say(f"{problem}; {KILLED}")
            with suppress(ProcessLookupError):
                os.kill(door.pid, signal.SIGKILL)
    else:
        return True
    _await_end(run, door)
    return False


def _silence(door: Door) -> str:
    """Why a process cannot be talked to; empty where it can. It is given the time that a busy machine needs."""
    try:
        with Wire.connect(door.address, door.token):
            return ""
    except CheckpointError as error:
        if not door.pid:
            raise
        return str(error)


def _is_snapshot_process(pid: int) -> bool:
    """Whether that is what the pid means here: /dev/shm may be shared with a container that numbers its own."""
    try:
        return __name__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _await_end(run: bytes, door: Door) -> None:
    """Return once a process that was told to end has, and its memory is given back."""
    deadline = time.monotonic() + END_S
    while find_process(run, door.address.label) is not None:
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"the snapshot process of an earlier start, at port {door.address.port} of this machine, has not ended "
                f"within {END_S:g} s of being told to; end it, or set checkpoint.snapshot_every_steps=0"
            )
        time.sleep(0.05)


def start_process(
    run: bytes,
    label: str,
    token: bytes,
    *,
    host: str = LOOPBACK,
    hold_s: float = 900.0,
    log: str | Path = os.devnull,
    folder: str = FOLDER,
) -> NodeAddress:
    """Start one and return once it listens. CheckpointError where it ends instead."""
    settings = {"run": run.hex(), "label": label, "token": token.hex(), "host": host, "hold_s": hold_s}
    with open(log, "ab") as file:
        # By its path and not by -m: the user's folder may hide our packages, and must not come first.
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            cwd="/",
            start_new_session=True,
        )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(settings | {"folder": folder}).encode() + b"\n")
    process.stdin.close()
    ready, _, _ = select.select([process.stdout], [], [], START_S)
    line = process.stdout.readline() if ready else b""
    process.stdout.close()
    if not line:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not line:
        raise CheckpointError(f"the snapshot process of node {label} did not start; see {log}")
    return NodeAddress(label, host, int(json.loads(line)["port"]))


def find_process(run: bytes, label: str, *, folder: str = FOLDER) -> Door | None:
    """The process of this run and node; None where there is none."""
    path = _door(run, label, folder)
    try:
        fd = open_private(path)
    except FileNotFoundError:
        return None
    try:
        content = os.read(fd, 4096)
        if try_lock(fd) or not content:  # its owner is dead, or just starting
            return None
    finally:
        os.close(fd)
    tree = json.loads(content)
    address = NodeAddress(label, tree["host"], int(tree["port"]))
    # the first said neither format nor pid
    return Door(address, bytes.fromhex(tree["token"]), int(tree.get("format", 0)), int(tree.get("pid", 0)))


def drop(roster: Roster) -> None:
    """End all of the run's snapshot processes, and with them what they hold. Those that are gone are passed over."""
    for node in roster.nodes:
        drop_node(node, roster.token)


def drop_node(node: NodeAddress, token: bytes) -> None:
    """The same of one, of whatever version of Atoll."""
    with suppress(CheckpointError), Wire.connect(node, token, agreeing=False) as wire:
        wire.ask({"do": "drop"})


def _door(run: bytes, label: str, folder: str) -> Path:
    return Path(folder, f"atoll-{run.hex()}-{label}.door")


_START = "import sys; sys.path.insert(0, sys.argv[1]); from checkpoint.snapshots.process import main; main()"


def main() -> None:
    # Twice removed from the worker that starts it: Ray ends the children of an actor with it.
    if os.fork():
        os._exit(0)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = json.loads(sys.stdin.readline())
    run, label, token = bytes.fromhex(settings["run"]), settings["label"], bytes.fromhex(settings["token"])
    # A SIGTERM or SIGINT for the whole job is for the workers, which end in order and then drop this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    node = SnapshotNode(run, label, token, settings["host"], hold_s=settings["hold_s"], folder=settings["folder"])
    path = _door(run, label, settings["folder"])
    door = create_locked(path)
    try:
        tree = {"host": settings["host"], "port": node.port, "token": token.hex(), "format": FORMAT, "pid": os.getpid()}
        os.write(door, json.dumps(tree).encode())
        os.write(1, json.dumps({"port": node.port}).encode() + b"\n")
        node.serve()
    finally:
        path.unlink(missing_ok=True)
        os.close(door)
