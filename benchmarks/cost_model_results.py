"""What `cost_model` has measured: rows by point and machines by rate, and the file they are kept in."""

import itertools
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.cost_model_grid import Point, Row  # noqa: E402
from benchmarks.report import write_report  # noqa: E402

CORES = sorted(os.sched_getaffinity(0))


class Results:
    """Rows and machines, kept in `out` as they come."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.rows: dict[Point, Row] = {}
        self.machines: dict[float, Row] = {}
        self.measured: Row = {}
        """Of a file that was read: when, by what and how it was measured."""
        self.rounds_before = 0
        self.hardware = (
            f"{platform.machine()}, {len(CORES)} of {os.cpu_count()} cores, Linux {platform.release()}, "
            f"load average {os.getloadavg()[0]:.1f} at the start"
        )

    @property
    def points(self) -> list[Point]:
        """Those that have a time."""
        return [point for point, row in self.rows.items() if row["rounds"]]

    def read(self, paths: Sequence[str]) -> None:
        """What earlier runs kept: rounds and trials of them all, the machines as the first one described them."""
        reports = [json.loads(Path(path).read_text()) for path in paths]
        self.hardware = "; ".join(dict.fromkeys(report["hardware"] for report in reports))
        self.measured = {name: reports[0][name] for name in ("date", "versions")}
        self.measured["command"] = "; ".join(dict.fromkeys(report["command"] for report in reports))
        names = [field.name for field in fields(Point)]
        for row in itertools.chain.from_iterable(report["rows"] for report in reports):
            if row["kind"] == "machine":
                self.machines.setdefault(row["rate"], {"machine": row["machine"], "points": row["points"]})
            elif row["kind"] == "step":
                values = {name: row[name] for name in names}
                point = Point(**values | {"triple": row["triple"] and tuple(row["triple"])})
                known = self.rows.setdefault(point, {**vars(point), "rounds": []})
                for kind in ("rounds", "trials"):
                    if kind in row:
                        known.setdefault(kind, []).extend(row[kind])
        for point in self.points:
            self.rows[point] |= over_rounds(self.rows[point]["rounds"])
        self.rounds_before = min(len(row["rounds"]) for row in self.rows.values())

    def keep(self, more: Sequence[Row] = ()) -> None:
        rows = [{"kind": "machine", "rate": rate, **machine} for rate, machine in self.machines.items()]
        write_report(self.out, self.hardware, [*rows, *({"kind": "step", **row} for row in self.rows.values()), *more])
        if self.measured:
            report = json.loads(Path(self.out).read_text())
            judged = {name: report[name] for name in ("date", "versions")}
            Path(self.out).write_text(json.dumps(report | self.measured | {"judged": judged}, indent=1) + "\n")


def over_rounds(rounds: list[Row]) -> Row:
    """The median of the rounds' medians, and how far the slowest is from the fastest."""
    medians = [statistics.median(found["steps_s"]) for found in rounds]
    return {
        "step_s": statistics.median(medians), "spread": max(medians) / min(medians) - 1, "sent": rounds[-1]["sent"]
    }  # fmt: skip
