"""Events of a run, shown to whoever started it.

On a terminal the last step is a live line that stays at the bottom, redrawn at most twenty times a second. Elsewhere a
step is a line of its own: every ``logger.every_steps``, at most one a second so that logs stay readable, the first and
the last always. Steps are shown as the number of steps done, from 1; ``metrics.jsonl`` counts from 0.

One thread calls `show`.
"""

import os
import sys
import time
from typing import Any, TextIO

Event = dict[str, Any]
LIVE_INTERVAL_S = 0.05
PLAIN_INTERVAL_S = 1.0
BAR_COLUMNS = 20
ERASE = "\r\x1b[K"


class Progress:
    """Shows the events of one run on a stream; docs/architecture.md lists them."""

    def __init__(self, total_steps: int, stream: TextIO | None = None, every_steps: int = 1) -> None:
        """stream: standard output by default. every_steps: of plain lines, ``logger.every_steps``."""
        self._total, self._stream, self._every = total_steps, stream or sys.stdout, every_steps
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._last_shown_s = -1e9
        self._pending: Event | None = None
        self._line = ""
        self._valid_loss: float | None = None
        self._first: tuple[int, float] | None = None

    def show(self, event: Event) -> None:
        """Show an event; of a type that is not known, its text."""
        kind = event["type"]
        if kind == "step":
            self._step(event)
        elif kind == "eval":
            self._valid_loss = event["valid_loss"]
            self._print(f"step {event['step']}/{self._total}  validation loss {event['valid_loss']:.4f}")
        elif kind == "sample":
            self._print("sample:\n" + "\n".join("  " + line for line in printable(event["text"]).splitlines()))
        else:
            if kind == "end":
                self._settle()
            if kind == "resumed":  # steps may be done again: what was seen before says nothing of them
                self._pending = self._first = None
            self._print(printable(event["text"]))

    def _step(self, event: Event) -> None:
        now, done = time.monotonic(), event["step"] + 1
        first = self._first is None
        if self._first is None:
            self._first = (done, now)
        self._pending = event
        interval_s = LIVE_INTERVAL_S if self._live else PLAIN_INTERVAL_S
        due = now - self._last_shown_s >= interval_s and (self._live or done % self._every == 0)
        if due or first or done == self._total:
            self._draw(event, now)

    def _draw(self, event: Event, now: float) -> None:
        self._last_shown_s, self._pending = now, None
        self._line = "  ".join(self._fields(event, now))
        if self._live:
            self._write(ERASE + self._line[: self._columns() - 1])
        else:
            self._write(self._line + "\n")

    def _fields(self, event: Event, now: float) -> list[str]:
        done = event["step"] + 1
        fields = [f"step {done}/{self._total}"]
        if self._live:
            fields.append(f"{self._bar(done)} {100 * done // self._total}%")
        fields.append(f"loss {event['loss']:.4f}")
        if self._live and self._valid_loss is not None:
            fields.append(f"valid {self._valid_loss:.4f}")
        if not self._live:
            fields += [f"grad norm {event['grad_norm']:.3g}", f"lr {event['lr']:.3g}"]
        fields.append(f"{count(event['tokens_per_s'])} tok/s")
        if event.get("mfu") is not None:
            fields.append(f"MFU {100 * event['mfu']:.1f}%")
        elif "flops_per_s" in event:
            fields.append(f"{count(event['flops_per_s'], ' ')}FLOP/s")
        if "memory_bytes" in event:
            fields.append(size(event["memory_bytes"]))
        return [*fields, f"ETA {duration(self._left_s(event, now))}"]

    def _left_s(self, event: Event, now: float) -> float:
        """From the wall time of the steps seen so far, so validations and checkpoints between them count."""
        assert self._first is not None
        first_done, first_s = self._first
        done: int = event["step"] + 1
        step_s = event["step_s"] if done == first_done else (now - first_s) / (done - first_done)
        return step_s * (self._total - done)

    def _bar(self, done: int) -> str:
        full, empty = ("━", "─") if _encodes(self._stream, "━─") else ("=", "-")
        columns = BAR_COLUMNS * done // self._total
        return full * columns + empty * (BAR_COLUMNS - columns)

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80  # 0: a terminal that was never sized
        except OSError:
            return 80

    def _settle(self) -> None:
        """Bring the last step on the screen and leave it there."""
        if self._pending is not None:
            self._draw(self._pending, time.monotonic())
        if self._live and self._line:
            self._write("\n")
            self._line = ""

    def _print(self, text: str) -> None:
        """Whole lines, above the live one."""
        live = ERASE + self._line[: self._columns() - 1] if self._live and self._line else ""
        self._write((ERASE if live else "") + text + "\n" + live)

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def count(number: float, gap: str = "") -> str:
    """Three digits and a prefix, `gap` between them: ``987``, ``12.3k``, ``1.23M``."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            return f"{number:.3g}{gap}{prefix}"
        number /= 1000
    return f"{number:.3g}{gap}P"


def plural(number: int, noun: str, ending: str = "s") -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def size(size_bytes: float) -> str:
    """``512 B``, ``3.4 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """``5s``, ``1m 20s``, ``3h 05m``, ``2d 04h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def printable(text: str) -> str:
    """`text` without control characters: a model over bytes also writes escape sequences, and terminals obey them."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _encodes(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
