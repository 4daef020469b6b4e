"""Seconds from a SIGKILL to the next finished step, and steps lost: workers and nodes of a running job, one by one.

    python benchmarks/recovery.py [--kinds worker node] [--kills 20] [--budget-s 900] [--nodes 4] [--out FILE]

A real Ray cluster on this machine: a head without CPUs, `--nodes` raylets that train, one rank each, and one more that
is free, as a cluster has that is to survive the loss of a node. `atoll train` with a snapshot in memory after every
step. At a random moment, once spares are ready (`--settle-s` after the last recovery), a rank's process is killed, or a
raylet with all its workers; after a node another one joins. At the end the losses of all steps are compared, to the
last bit, with those of the same job that nobody disturbed. Prints a table, one line a kind: median and worst, in whole
and by part:

    found        the kill → the driver knows
    out          the survivors are out of their process group, and all is known about the cause
    joined       places are filled, the new process group stands
    restored     the ranks have the state of the newest snapshot
    first step   it is done
"""

import argparse
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.report import write_report  # noqa: E402
from tests.launch.supervised import SNAPSHOTS, Raylets, Run, losses  # noqa: E402

PARTS = ("found", "out", "loaded", "joined", "restored", "first step")
RECOVERED = re.compile(r"recovered in [\d.]+ s from \w+, step \d+: (.*)")
ENDLESS = 1_000_000


class Broken:
    """A job that is being broken, and what each kill cost."""

    def __init__(self, args: argparse.Namespace, root: Path) -> None:
        self._draw, self._settle_s = random.Random(args.seed), args.settle_s
        self.raylets = Raylets(args.nodes + 1)
        self.shape = [
            f"train.seq_len={args.seq_len}",
            f"train.global_batch_size={args.nodes}",
            "launch.max_failures=9999",
        ]
        self.shape += [f"launch.address={self.raylets.address}"]
        self.shape += [f"launch.nodes={args.nodes}", f"launch.workers={args.nodes}"]
        self.run = Run(root, *self.shape, SNAPSHOTS, f"train.steps={ENDLESS}")
        self._num_failures = 0

    def kill(self, kind: str) -> dict[str, Any]:
        """One kill at a random moment, and its recovery: seconds by part, and in whole."""
        run, draw = self.run, self._draw
        reached = run.steps
        time.sleep(self._settle_s)
        run.wait(lambda: run.steps > reached + 2, 120)
        time.sleep(draw.random())
        victim = draw.choice(run.team["ranks"])
        killed_at = time.time()
        if kind == "worker":
            os.kill(victim["pid"], signal.SIGKILL)
        else:
            self.raylets.kill(victim["node_id"])
        run.wait(lambda: len(run.failures) > self._num_failures, 120)
        run.wait(lambda: len(RECOVERED.findall(run.said)) == len(run.failures))
        *others, failure = run.failures[self._num_failures :]
        assert not others, f"one kill, but also {others}"
        self._num_failures += 1
        parts = [part.rsplit(" ", 2) for part in RECOVERED.findall(run.said)[-1].split(", ")]
        assert failure.recover_s is not None
        found_s = failure.time - killed_at
        result: dict[str, Any] = {"kind": kind, "cause": failure.cause, "from": failure.restored_from}
        result |= {"whole": found_s + failure.recover_s, "found": found_s} | {name: float(s) for name, s, _ in parts}
        result |= {"steps_lost": failure.steps_lost, "world_after": failure.world_after}
        if kind == "node":
            self.raylets.add()
        return result

    def end(self) -> None:
        self.run.process.send_signal(signal.SIGTERM)
        if (code := self.run.end()) != 75:
            raise RuntimeError(f"the job ended with {code}:\n{self.run.said}")

    def is_undisturbed(self, root: Path) -> bool:
        """Whether every loss is that of the same job without a kill."""
        found = losses(self.run.folder)
        again = Run(root, *self.shape, f"train.steps={len(found)}")
        try:
            if again.end(3600) != 0:
                raise RuntimeError(again.said)
            return losses(again.folder) == found
        finally:
            again.close()

    def close(self) -> None:
        self.run.close()
        self.raylets.close()


def table(rows: list[dict[str, Any]]) -> None:
    names = ["whole", *PARTS, "steps_lost"]
    print(f"{'kind':8}{'kills':>6}" + "".join(f"{name:>16}" for name in names) + "   (median / worst)")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        cells = [[row[name] for row in mine] for name in names]
        figures = [f"{statistics.median(cell):.2f} / {max(cell):.2f}" for cell in cells]
        print(f"{kind:8}{len(mine):6}" + "".join(f"{figure:>16}" for figure in figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=("worker", "node"), default=["worker", "node"])
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--budget-s", type=float, default=900, help="no kill is begun after so long")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--settle-s", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-check", action="store_true", help="do not run the undisturbed job")
    parser.add_argument("--out", default=str(HERE / "results" / "recovery.json"))
    args = parser.parse_args()
    begun, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="atoll-recovery-") as folder:
        root = Path(folder)
        (root / "again").mkdir()
        broken = Broken(args, root)
        try:
            broken.run.wait(lambda: broken.run.steps > 0, 180)
            for kind in args.kinds:
                for _ in range(args.kills):
                    if time.monotonic() - begun > args.budget_s:
                        break
                    rows.append(broken.kill(kind))
                    shown = {name: round(s, 2) if isinstance(s, float) else s for name, s in rows[-1].items()}
                    print(shown, flush=True)
            broken.end()
            exact = None if args.no_check else broken.is_undisturbed(root / "again")
        finally:
            broken.close()
    table(rows)
    print(f"losses of all steps bitwise those of an undisturbed job: {'not checked' if exact is None else exact}")
    cpu = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    model = next(
        (line.split(":", 1)[1].strip() for line in cpu.splitlines() if "Model name" in line), platform.machine()
    )
    write_report(args.out, f"{os.cpu_count()} cores of {model}, all raylets on them", [*rows, {"bitwise": exact}])
    if exact is False:
        sys.exit("the losses differ")


if __name__ == "__main__":
    main()
