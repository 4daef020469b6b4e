"""Snapshot nodes that halt at a named phase of a named step, so that a test can kill them just there.

A test makes a `Halts` and arms it; `HaltingGeneration`, which knows of it by a file, connects to it from the thread
that has reached the phase and waits for the connection's end. Other threads of the node go on: they answer whoever
still needs something of it to reach the same phase. Nothing of this is in the code that is tested.

    python -c "from tests.checkpoint.halts import main; main()"      a snapshot process that halts
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from checkpoint.crc import Bytes
from checkpoint.snapshots import node, process
from checkpoint.snapshots.generation import Generation, Making
from checkpoint.snapshots.segment import Draft
from checkpoint.snapshots.wire import Message, Wire

VARIABLE = "ATOLL_TEST_HALTS"
"""Names the file, in the environment of a process."""
START = "import sys; sys.path.insert(0, sys.argv[1]); from tests.checkpoint.halts import main; main()"

PHASES = {
    "begun": "the slot's record is erased, no state written",
    "written": "the ranks have written their state, the node does not know yet",
    "sealed": "the k chunks have their headers; nobody has read them",
    "chunks": "the chunks of a stripe have come to its encoder, checked; no parity is made",
    "parity": "the first slice of a parity has come to the node that keeps it (from parity 2 on)",
    "encoded": "all parities are made and kept where they belong",
    "prepared": "the slot's record is written; the coordinator does not know",
    "deciding": "the coordinator knows that all have prepared, and has told nobody",
    "hearing": "the coordinator has decided, and one node is just being told",
    "committed": "all have been told",
}
BEFORE_PARITY = ("begun", "written", "sealed")
"""Where a node that dies has given no other its chunks: the version cannot be prepared any more."""
COORDINATED = ("deciding", "hearing", "committed")
PREPARED = ("prepared", *COORDINATED)
"""Where every node holds the version."""


def phases(parity: int) -> list[str]:
    return [phase for phase in PHASES if phase != "parity" or parity > 1]


def halted_at(phase: str, labels: Sequence[str]) -> set[str]:
    """Which nodes get to `phase` before one must be let go; `labels` in the plan's order, the coordinator first."""
    first, second, *_ = labels
    return {"deciding": {first}, "hearing": {second}, "committed": {first}}.get(phase, set(labels))


class Halts:
    """The test's side."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._changed = threading.Condition()
        self._halted: dict[str, list[socket.socket]] = {}
        self._armed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, phase: str, step: int) -> None:
        self._armed = True
        self._write({"phase": phase, "step": step, "port": self._listener.getsockname()[1]})

    def wait(self, labels: Collection[str], timeout_s: float = 60) -> None:
        """Until all of them have halted."""
        with self._changed:
            if not self._changed.wait_for(lambda: set(labels) <= set(self._halted), timeout_s):
                raise TimeoutError(f"{sorted(labels)} should have halted, {sorted(self._halted)} have")

    def release(self) -> None:
        """Let all go on, those too that come later."""
        self._write({})
        with self._changed:
            self._armed = False
            for connection in [connection for found in self._halted.values() for connection in found]:
                connection.close()
            self._halted.clear()

    def close(self) -> None:
        self.release()
        self._listener.close()

    def _write(self, content: dict[str, Any]) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        partial.replace(self.file)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                label = connection.makefile().readline().strip()
                with self._changed:
                    if self._armed:
                        self._halted.setdefault(label, []).append(connection)
                        self._changed.notify_all()
                    else:
                        connection.close()


class HaltingGeneration(Generation):
    """Halts where the file says. Of `super()`, only what happens before or after a phase is known here."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self._encoder is not None:
            self._encoder.code = _HaltingCode(self._encoder.code, self)  # type: ignore[assignment]

    def halt(self, phase: str, draft: Draft | None = None) -> None:
        """`draft`: of the version that has got there; by default the one being made."""
        armed = json.loads(Path(os.environ[VARIABLE]).read_text())
        draft = draft or self._making.draft
        if armed.get("phase") != phase or draft is None or draft.step != armed["step"]:
            return
        with socket.create_connection(("127.0.0.1", armed["port"])) as connection:
            connection.sendall(f"{self.label}\n".encode())
            with contextlib.suppress(OSError):
                connection.recv(1)

    def begin(self, version: int, step: int | None) -> int:
        slot = super().begin(version, step)
        self.halt("begun")
        return slot

    def written(self, version: int, part: Any, fault: str) -> None:
        self.halt("written")
        super().written(version, part, fault)

    def _seal(self, making: Making) -> None:
        super()._seal(making)
        self.halt("sealed")

    def receive_parity(self, message: Message, size: int, wire: Wire) -> None:
        super().receive_parity(message, size, wire)
        self.halt("parity")

    def _encode(self, making: Making) -> None:
        super()._encode(making)
        self.halt("encoded")

    def _prepare(self, making: Making) -> None:
        super()._prepare(making)
        self.halt("prepared")

    def _announce(self, version: int, problem: str) -> None:
        if not problem:
            self.halt("deciding")
        super()._announce(version, problem)

    def open(self, version: int, committed: list[int], problem: str) -> None:
        coordinator = self.label == self.plan.coordinator
        if not coordinator and version - 1 in committed:
            self.halt("hearing")
        draft = self._making.draft
        super().open(version, committed, problem)
        if coordinator and version - 1 in committed:
            self.halt("committed", draft)


class _HaltingCode:
    def __init__(self, code: Any, generation: HaltingGeneration) -> None:
        self._code, self._generation = code, generation

    def encode(self, data: list[Bytes], parity: list[Bytes]) -> None:
        self._generation.halt("chunks")
        self._code.encode(data, parity)


@contextlib.contextmanager
def halting(file: Path) -> Iterator[Halts]:
    """Snapshot nodes of this process, and processes started from here, halt."""
    halts = Halts(file)
    halts.release()
    with (
        patch.dict(os.environ, {VARIABLE: str(file)}),
        patch.object(node, "Generation", HaltingGeneration),
        patch.object(node, "SETTLE_S", 0.01),
        patch.object(process, "_START", START),
    ):
        try:
            yield halts
        finally:
            halts.close()


def main() -> None:
    node.Generation = HaltingGeneration  # type: ignore[misc]
    process.main()
