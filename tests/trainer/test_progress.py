import fcntl
import io
import os
import pty
import select
import struct
import termios
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from trainer import progress
from trainer.progress import Progress, count, duration, printable, size


def step(number: int, **more: object) -> dict[str, object]:
    event = {"type": "step", "step": number, "loss": 3.14159, "grad_norm": 0.912, "lr": 3e-4, "tokens": 4096}
    return {**event, "tokens_per_s": 12345.6, "step_s": 2.0, "memory_bytes": 3.4 * 2**30, **more}


class Terminal:
    """A pseudo-terminal of `columns` columns: what is written to `stream` is read back by `text`."""

    def __init__(self, columns: int) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")

    def text(self) -> str:
        """All that was written; a terminal may hand it over in parts."""
        self.stream.flush()
        parts = []
        while select.select([self.master], [], [], 0.2)[0]:
            parts.append(os.read(self.master, 1 << 16))
        return b"".join(parts).decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self.master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    found = Terminal(120)
    yield found
    found.close()


def test_a_terminal_shows_one_line_that_moves(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LIVE_INTERVAL_S", 0.0)
    shown = Progress(100, terminal.stream)
    shown.show({"type": "eval", "step": 0, "valid_loss": 5.5})
    for number in range(3):
        shown.show(step(number, mfu=0.456))
    text = terminal.text()
    assert text.count("\n") == 1, "the validation alone ends a line"
    last = text.split("\r\x1b[K")[-1]
    for part in ("step 3/100", "3%", "loss 3.1416", "valid 5.5000", "12.3k tok/s", "MFU 45.6%", "3.4 GiB", "ETA "):
        assert part in last


def test_the_live_line_is_cut_to_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(30)
    Progress(100, terminal.stream).show(step(41))
    line = terminal.text().removeprefix("\r\x1b[K")
    assert line.startswith("step 42/100  ━") and len(line) == 29
    terminal.close()


def test_messages_stand_above_the_live_line(terminal: Terminal) -> None:
    shown = Progress(100, terminal.stream)
    shown.show(step(0))
    live = terminal.text()
    shown.show({"type": "message", "text": "checkpoint written"})
    assert terminal.text() == "\r\x1b[Kcheckpoint written\r\n" + live


def test_the_last_live_line_stays_when_the_run_ends(terminal: Terminal) -> None:
    shown = Progress(100, terminal.stream)
    shown.show(step(0))
    shown.show(step(1))  # too soon after the other to be drawn
    shown.show({"type": "end", "status": "stopped", "text": "stopped after step 2"})
    text = terminal.text()
    assert text.split("\r\x1b[K")[-1].startswith("step 2/100")
    assert text.endswith("\r\nstopped after step 2\r\n")


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    Progress(100, terminal.stream).show(step(0))
    text = terminal.text()
    assert "\x1b" not in text and text.endswith("\r\n")


def test_a_plain_line_says_all_of_a_step() -> None:
    stream = io.StringIO()
    Progress(400, stream).show(step(119, flops_per_s=52.3e9, mfu=None))
    assert stream.getvalue() == (
        "step 120/400  loss 3.1416  grad norm 0.912  lr 0.0003  12.3k tok/s  52.3 GFLOP/s  3.4 GiB  ETA 9m 20s\n"
    )


def test_plain_lines_of_fast_steps_are_rare_but_the_first_and_last_stand() -> None:
    stream = io.StringIO()
    shown = Progress(500, stream)
    for number in range(500):
        shown.show(step(number))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/500") and lines[-1].startswith("step 500/500") and len(lines) < 5


def test_plain_lines_come_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    stream = io.StringIO()
    shown = Progress(12, stream, every_steps=5)
    for number in range(12):
        shown.show(step(number))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/12", "5/12", "10/12", "12/12"]


def test_a_stopped_run_ends_with_its_last_step() -> None:
    stream = io.StringIO()
    shown = Progress(100, stream)
    shown.show(step(0))
    shown.show(step(1))
    shown.show({"type": "end", "status": "stopped", "text": "stopped"})
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["step 1/100", "step 2/100", "stopped"]


def test_the_eta_counts_from_the_first_step_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    shown = Progress(100, stream)
    shown.show(step(49))  # resumed
    shown.show(step(54))
    assert stream.getvalue().splitlines()[-1].endswith("ETA 1m 30s")


def test_a_sample_cannot_steer_the_terminal() -> None:
    stream = io.StringIO()
    Progress(1, stream).show({"type": "sample", "text": "def f():\n\treturn\x1b[2J\x07é"})
    assert stream.getvalue() == "sample:\n  def f():\n  \treturn\ufffd[2J\ufffdé\n"


def test_a_stream_without_unicode_is_written_all_the_same() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Progress(1, stream).show({"type": "message", "text": "naïve"})
    assert raw.getvalue() == b"na?ve\n"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (count(987), "987"),
        (count(12345), "12.3k"),
        (count(999_600), "1M"),
        (count(5.2e10, " "), "52 G"),
        (size(512), "512 B"),
        (size(3.4 * 2**30), "3.4 GiB"),
        (duration(5.4), "5s"),
        (duration(80), "1m 20s"),
        (duration(3 * 3600 + 300), "3h 05m"),
        (duration(2 * 86400 + 4 * 3600), "2d 04h"),
        (printable("a\tb\n\r"), "a\tb\n\ufffd"),
    ],
)
def test_numbers_are_made_for_people(found: str, expected: str) -> None:
    assert found == expected


def test_steps_before_a_recovery_are_not_shown_after_it() -> None:
    stream = io.StringIO()
    shown = Progress(100, stream)
    shown.show(step(0))
    shown.show(step(1))  # too soon for a line of its own
    shown.show({"type": "resumed", "step": 1, "from": "memory", "text": "resumed from step 1"})
    shown.show({"type": "end", "status": "stopped", "text": "stopped after step 1"})
    assert "step 2/" not in stream.getvalue()
