"""SIGKILLs a writer again and again and looks at what it left. Run by test_shared.py, in its own process, as it forks.

    python segment_killer.py FOLDER NUM_SLOTS KILLS

Prints one JSON object. The writer writes versions as fast as it can and, after each commit, says which in a pipe.
"""

import json
import os
import random
import signal
import sys
import time

import numpy as np

from checkpoint.erasure.protocol import versions_to_keep
from checkpoint.snapshots.segment import Segment

_PAYLOAD = 128 << 10


def _fill(payload: np.ndarray, version: int) -> None:
    payload.view(np.uint64)[:] = np.uint64(version) * np.arange(1, len(payload) // 8 + 1, dtype=np.uint64)


def _write_for_ever(path: str, first: int, pipe: int) -> None:
    segment = Segment.open(path)
    committed = [held.version for held in segment.committed()]
    version = first
    while True:
        draft = segment.begin(version, version * 10, versions_to_keep(committed, segment.num_slots))
        _fill(draft.payload, version)
        draft.commit(f"meta of {version}".encode() * (1 + version % 50))
        os.write(pipe, version.to_bytes(8, "little"))
        committed.append(version)
        version += 1


def _kill_one(path: str, first: int, delay_s: float) -> int:
    """Last version that the writer says it has committed; -1 for none."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _write_for_ever(path, first, write)
        finally:
            os._exit(1)
    os.close(write)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    said = b""
    while part := os.read(read, 1 << 16):
        said += part
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    return int.from_bytes(said[-8:], "little") if said else -1


def main(folder: str, num_slots: int, kills: int) -> None:
    generator = random.Random(num_slots)
    segment = Segment.create(
        os.urandom(16), "kill", num_slots=num_slots, payload_bytes=_PAYLOAD, meta_bytes=4096, folder=folder
    )
    expected, found, unsaid, partial = np.empty(_PAYLOAD, dtype=np.uint8), [], 0, 0
    last, highest = -1, 0
    for _ in range(kills):
        said = _kill_one(str(segment.path), highest + 1, generator.uniform(0, 0.008))
        last = max(last, said)
        versions = segment.committed()
        held = [version.version for version in versions]
        for version in versions:
            _fill(expected, version.version)
            assert np.array_equal(version.payload, expected), f"version {version.version} is not what was written"
            assert version.meta == f"meta of {version.version}".encode() * (1 + version.version % 50)
            assert version.step == version.version * 10
        assert held == sorted(held, reverse=True)
        if last >= 0:
            assert held and held[0] in (last, last + 1), f"{held} are there, {last} was committed"
            # All slots but the one being written: the newest commits, without a gap.
            assert held[: num_slots - 1] == [held[0] - back for back in range(min(num_slots - 1, held[0]))], held
        unsaid += bool(held) and held[0] > last
        partial += len(held) < min(num_slots, held[0] if held else 0)
        highest = max(highest, held[0] if held else 0)
        last = max(last, held[0] if held else -1)
        found.append(len(held))
    segment.destroy()
    print(json.dumps({"kills": kills, "versions": highest, "while_writing": partial, "committed_unsaid": unsaid}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
