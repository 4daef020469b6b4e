"""What a rank does whose machine is cut off."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from launch.fence import silent

WATCH = """
import time
import launch.fence as fence
fence.EVERY_S, fence.CUT_OFF_S = 0.1, 0.5
made = fence.Fence("127.0.0.1:{port}")
time.sleep(3)
made.close()
"""


@pytest.fixture
def silence() -> Iterator[tuple[str, int]]:
    """An address at which the kernel drops whoever comes: its queue is full."""
    with ExitStack() as held:
        server = held.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            one = held.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        time.sleep(0.1)
        yield server.getsockname()


def test_a_refusal_is_an_answer(silence: tuple[str, int]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert not silent(taken.getsockname(), 1.0)
        taken.listen()
        assert not silent(taken.getsockname(), 1.0)
    assert silent(silence, 0.2)


def test_a_process_ends_where_nothing_comes(silence: tuple[str, int]) -> None:
    began = time.monotonic()
    command = [sys.executable, "-c", WATCH.format(port=silence[1])]
    cut = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert cut.returncode == 1 and "this machine is cut off" in cut.stderr and time.monotonic() - began < 30


def test_a_process_stays_where_somebody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", WATCH.format(port=server.getsockname()[1])]
        assert subprocess.run(command, timeout=60).returncode == 0
