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
import signal
import subprocess
import sys
from pathlib import Path

from checkpoint.errors import CheckpointError
from checkpoint.snapshots.node import SnapshotNode
from checkpoint.snapshots.roster import Roster
from checkpoint.snapshots.segment_files import FOLDER, create_locked, open_private, try_lock
from checkpoint.snapshots.wire import NodeAddress, Wire

LOOPBACK = "127.0.0.1"
START_S = 60.0
NICENESS = 10
"""Encoding and sealing take the cores that training leaves idle."""


def local_roster(run: bytes, world: int, *, hold_s: float, log: str | Path = os.devnull) -> Roster:
    """All ranks on this machine: the process that is there from an earlier start of this run, else a new one."""
    found = find_process(run, "local")
    if found is None:
        token = secrets.token_bytes(32)
        found = start_process(run, "local", token, hold_s=hold_s, log=log), token
    address, token = found
    return Roster(run=run, token=token, nodes=(address,), rank_nodes=(0,) * world)


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
    line = process.stdout.readline()
    process.stdout.close()
    process.wait(START_S)
    if not line:
        raise CheckpointError(f"the snapshot process of node {label} did not start; see {log}")
    return NodeAddress(label, host, int(json.loads(line)["port"]))


def find_process(run: bytes, label: str, *, folder: str = FOLDER) -> tuple[NodeAddress, bytes] | None:
    """Where the process of this run and node listens, and its token; None where there is none."""
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
    return NodeAddress(label, tree["host"], int(tree["port"])), bytes.fromhex(tree["token"])


def drop(roster: Roster) -> None:
    """End all of the run's snapshot processes, and with them what they hold. Those that are gone are passed over."""
    for node in roster.nodes:
        try:
            with Wire.connect(node, roster.token) as wire:
                wire.ask({"do": "drop"})
        except CheckpointError:
            continue


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
        os.write(door, json.dumps({"host": settings["host"], "port": node.port, "token": token.hex()}).encode())
        os.write(1, json.dumps({"port": node.port}).encode() + b"\n")
        node.serve()
    finally:
        path.unlink(missing_ok=True)
        os.close(door)
