"""``atoll report``: what became of a run, every failure of it, and where its time went, from its folder alone.

**Goodput** is the time of the steps that counted over the time since the first start, whatever was restarted in
between. The rest is told apart: starting up, recovering from failures, steps that had to be done again, validation,
standing for checkpoints, and the time in which nothing ran at all.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.failures import FILE, FailureRecord
from launch.runs import find_run, is_running, parse
from trainer import timeline
from trainer.loggers import read_lines
from trainer.progress import duration

WHAT_COLUMNS = 90
WORDS = {"numbers": "bad numbers"}
"""What a cause is called where its name alone says too little."""
USAGE = "atoll report [run.name=<run>] [run.root=runs]"


@dataclass
class Shares:
    """Where the time since the first start went, in seconds."""

    steps: float = 0.0
    """Of the steps that counted."""
    startup: float = 0.0
    """From a start of the command to its first step."""
    recovery: float = 0.0
    """From the last sign of a team that failed to the first step of the next."""
    recomputed: float = 0.0
    """Of steps that were lost, and done again since."""
    validation: float = 0.0
    checkpoints: float = 0.0
    """In which the loop stood for them; most of a save runs beside the steps."""
    absent: float = 0.0
    """In which nothing ran, between a driver's end and the next one's start."""
    wall: float = 0.0

    @property
    def rest(self) -> float:
        known = self.steps + self.startup + self.recovery + self.recomputed + self.validation
        return max(0.0, self.wall - known - self.checkpoints - self.absent)

    @property
    def goodput(self) -> float:
        """Between 0 and 1."""
        return min(1.0, self.steps / self.wall) if self.wall > 0 else 0.0


@dataclass
class Summary:
    """What a run's folder tells. `atoll report` prints it; benchmarks read it."""

    folder: Path
    steps_done: int
    num_starts: int
    running: bool
    status: str
    """``finished`` or ``stopped``, ``running``, or ``ended before its time``."""
    shares: Shares
    failures: list[FailureRecord] = field(default_factory=list)
    num_broken: int = 0
    """Faults that `atoll chaos` made."""


def report(args: list[str]) -> str:
    """The text; ValueError where there is no such run."""
    given = parse(args, ("run.name", "run.root"), USAGE)
    return show(summarize(find_run(given.get("run.root", "runs"), given.get("run.name"))))


def summarize(folder: Path, now: float | None = None) -> Summary:
    events, metrics = timeline.read(folder), read_lines(folder / "metrics.jsonl")
    running = is_running(folder)
    last: dict[str, Any] = next((event for event in reversed(events) if event["event"] != "exit"), {})
    status = "running" if running else last.get("status", "ended before its time")
    return Summary(
        folder=folder,
        steps_done=metrics[-1]["step"] + 1 if metrics else 0,
        num_starts=sum(event["event"] == "start" for event in events),
        running=running,
        status=status,
        shares=add_up(events, metrics, (time.time() if now is None else now) if running else None),
        failures=FailureRecord.read(folder / FILE),
        num_broken=len(read_lines(folder / "chaos.jsonl")),
    )


def add_up(events: list[dict[str, Any]], metrics: list[dict[str, Any]], now: float | None) -> Shares:
    """events: a timeline, oldest first; metrics: the steps that count; now: Unix time, where the run is running."""
    shares = Shares(
        steps=sum(line["step_s"] for line in metrics),
        recomputed=_seconds(events, "lost"),
        validation=_seconds(events, "eval"),
        checkpoints=_seconds(events, "save"),
    )
    if not events:
        return shares
    # every moment at which the run is known to have lived
    signs = [float(line["time"]) for line in metrics if "time" in line]
    signs += [float(event["active"]) for event in events if event["event"] == "lost" and event["active"]]
    signs += [float(event["time"]) for event in events if event["event"] not in ("start", "train", "lost")]
    signs.sort()

    def last_sign(before: float, since: float) -> float:
        return max((sign for sign in signs if since <= sign <= before), default=since)

    starts = [float(event["time"]) for event in events if event["event"] == "start"] or [float(events[0]["time"])]
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        until = following if following is not None else now if now is not None else float("inf")
        begun = [t for event in events if event["event"] == "train" and start <= (t := float(event["time"])) <= until]
        end = now if following is None and now is not None else last_sign(until, begun[-1] if begun else start)
        shares.startup += (begun[0] if begun else end) - start
        shares.recovery += sum(
            later - last_sign(later, before) for before, later in zip(begun, begun[1:], strict=False)
        )
        shares.absent += following - end if following is not None else 0.0
        shares.wall = end - starts[0]
    return shares


def _seconds(events: list[dict[str, Any]], name: str) -> float:
    return sum(float(event["seconds"]) for event in events if event["event"] == name)


def show(summary: Summary) -> str:
    """The report as text for a terminal."""
    shares, starts = summary.shares, summary.num_starts
    lines = [
        f"run      {summary.folder}: {summary.status}, {summary.steps_done} steps done, "
        f"{starts} {'start' if starts == 1 else 'starts'}, {duration(shares.wall)} since the first",
        f"goodput  {shares.goodput:.1%}",
    ]
    parts = {
        "steps": shares.steps,
        "start-up": shares.startup,
        "recovery": shares.recovery,
        "steps done again": shares.recomputed,
        "validation": shares.validation,
        "checkpoints": shares.checkpoints,
        "not running": shares.absent,
        "rest": shares.rest,
    }
    lines += [
        f"  {name:18}{seconds / shares.wall:7.1%}  {_time(seconds)}"
        for name, seconds in parts.items()
        if shares.wall > 0 and seconds > 0
    ]
    return "\n".join([*lines, show_failures(summary.failures, summary.num_broken)])


def show_failures(failures: list[FailureRecord], num_broken: int = 0) -> str:
    """A table, one line a failure and what it was under it."""
    broken = f", {num_broken} made by atoll chaos" if num_broken else ""
    if not failures:
        return f"failures none{broken}"
    head = ("when", "cause", "found", "from", "step", "lost", "next step", "world", "what")
    table = [head, *(_row(record) for record in failures)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head) - 1)]
    causes = Counter(WORDS.get(record.cause, record.cause) for record in failures)
    lines = [f"failures {len(failures)} ({', '.join(f'{cause} {count}' for cause, count in causes.items())}){broken}"]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    lost = sum(record.steps_lost or 0 for record in failures)
    again = sum(record.recover_s or 0.0 for record in failures)
    return "\n".join([*lines, f"  in all: {lost} steps lost, {_time(again)} until the next steps"])


def _row(record: FailureRecord) -> tuple[str, ...]:
    when = time.strftime("%m-%d %H:%M:%S", time.localtime(record.time))
    after = f"{record.world_before} -> {record.world_after}" if record.world_after is not None else "given up"
    where = f"rank {record.rank}" if record.rank is not None else f"node {record.node}"
    return (
        when,
        WORDS.get(record.cause, record.cause),
        f"after {_time(record.found_s)}",
        record.restored_from or "-",
        str(record.step),
        "-" if record.steps_lost is None else str(record.steps_lost),
        "-" if record.recover_s is None else f"after {_time(record.recover_s)}",
        after if record.world_before != record.world_after else str(record.world_after),
        f"{where}: {_short(record.what)}",
    )


def _short(what: str) -> str:
    """The first part of a sentence: ``failures.jsonl`` has the whole."""
    first = what.partition("\n")[0].partition("; ")[0]
    return first if len(first) <= WHAT_COLUMNS else first[: WHAT_COLUMNS - 1] + "…"


def _time(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)
