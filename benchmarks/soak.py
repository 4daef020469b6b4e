"""One run, many faults of all kinds: it must end by itself with the losses of the run that nobody disturbed.

    python benchmarks/soak.py [--faults 50] [--nodes 3] [--steps 4000] [--seed 0] [--budget-s 3000] [--out FILE]

A real Ray cluster on this machine: a head without CPUs, `--nodes` raylets that train, one rank each, and one that is
free. Faults are drawn by `--seed` and made by `atoll chaos`: a rank killed, a node killed (another joins), a rank
stopped, a bit of a snapshot flipped, a byte of the newest checkpoint changed, and the driver told to stop by SIGTERM
and started again. Between two faults the run does a few steps. When all are made it is left alone until it ends. Then,
against the same job undisturbed: every loss, to the last bit; what is left of processes, shared memory and files; the
report.
"""

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.report import write_report  # noqa: E402
from launch.chaos import parse_plan, strike  # noqa: E402
from launch.report import show, summarize  # noqa: E402
from tests.launch.supervised import SNAPSHOTS, Raylets, Run, losses  # noqa: E402

KINDS = {"worker": 4, "node": 2, "hang": 2, "corrupt": 2, "disk": 1, "sigterm": 1}
"""How often each is drawn, relative to the others."""
NO_EVAL = ["train.eval_every_steps=0"]
SETTLED_STEPS = 3
"""Steps after a recovery, before the next fault."""


class Soak:
    def __init__(self, args: argparse.Namespace, root: Path) -> None:
        self._args, self._root, self._draw = args, root, random.Random(args.seed)
        self._deadline = time.monotonic() + args.budget_s
        self.raylets = Raylets(args.nodes + 1)
        self._overrides = [
            f"launch.address={self.raylets.address}",
            f"launch.nodes={args.nodes}",
            f"launch.workers={args.nodes}",
            SNAPSHOTS,
            "checkpoint.every_steps=100",
            "checkpoint.snapshot_hold_s=120",
            f"launch.hang_timeout_s={args.hang_timeout_s}",
            "launch.max_failures=9999",
            f"train.steps={args.steps}",
            *NO_EVAL,
        ]
        self.made: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.run = Run(root, *self._overrides)

    def break_it(self) -> None:
        """Make the faults, each after the run has settled from the one before."""
        kinds = self._draw.sample(list(KINDS), len(KINDS))  # each once, whatever else is drawn
        kinds += self._draw.choices(list(KINDS), list(KINDS.values()), k=max(0, self._args.faults - len(kinds)))
        for number, kind in enumerate(kinds[: self._args.faults]):
            made = False
            while not made:
                self._settle()
                if self._ended() or time.monotonic() > self._deadline:
                    return
                time.sleep(self._draw.random() * self._args.every_s)
                made = self._make(kind)
            self.made[kind] += 1
            print(f"fault {number + 1}/{self._args.faults}, after {self.run.steps} steps: {kind}", flush=True)

    def _settle(self) -> None:
        wanted = self.run.steps + SETTLED_STEPS
        while not self._ended() and not self.run.steps >= wanted and time.monotonic() < self._deadline:
            time.sleep(0.05)

    def _make(self, kind: str) -> bool:
        """Whether there was something to break: the team may just be being made anew."""
        if kind == "sigterm":
            self.run.process.send_signal(signal.SIGTERM)
            code = self.run.end(self._args.patience_s)
            if code not in (0, 75):
                raise SystemExit(f"SIGTERM: it ended with {code}\n{self.run.said}")
            self.run = Run(self._root, *self._overrides)
            return True
        words = [f"kill={kind}", f"seed={self._draw.randrange(1 << 30)}", f"run.root={self._root}", "run.name=job"]
        words += ["yes=true"] if kind == "disk" else []
        try:
            strike(parse_plan(words))
        except ValueError as error:
            print(f"  not made: {error}", flush=True)
            return False
        if kind == "node":
            self.raylets.add()
        return True

    def _ended(self) -> bool:
        code = self.run.process.poll()
        if code not in (None, 0):
            raise SystemExit(f"the run ended with {code}\n{self.run.said[-6000:]}")
        return code == 0


def leftovers(run_id: str, root: Path) -> dict[str, list[str]]:
    """What is left of a run that has ended: shared memory, and processes at work in its folder."""
    import psutil

    processes = []
    for process in psutil.process_iter(["name"]):
        try:
            if Path(process.cwd()).is_relative_to(root):
                processes.append(process.info["name"])
        except psutil.Error:
            continue
    return {"memory": [file.name for file in Path("/dev/shm").glob(f"atoll-{run_id}-*")], "processes": processes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-s", type=float, default=4.0, help="longest wait before a fault")
    parser.add_argument("--hang-timeout-s", type=float, default=6.0)
    parser.add_argument("--patience-s", type=float, default=120.0, help="for a stop")
    parser.add_argument("--budget-s", type=float, default=3000.0)
    parser.add_argument("--out", default=str(HERE / "results" / "soak.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="atoll-soak-") as folder:
        root = Path(folder)
        began = time.monotonic()
        soak = Soak(args, root)
        try:
            soak.break_it()
            code = soak.run.end(max(60.0, args.budget_s - (time.monotonic() - began)))
            wall_s = time.monotonic() - began
            time.sleep(3)  # Ray ends its actors after the driver is gone
            left = leftovers((root / "job" / "run.id").read_text(), root)
        finally:
            soak.run.close()
            soak.raylets.close()
        print("the undisturbed run …", flush=True)
        subprocess.run(
            [
                sys.executable, HERE.parent / "tests" / "launch" / "supervised.py", str(args.nodes), folder,
                f"train.steps={args.steps}", *NO_EVAL,
            ],
            check=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        )  # fmt: skip
        found, whole = losses(root / "job"), losses(root / "undisturbed")
        summary = summarize(root / "job")
        files = sorted(file.name for file in (root / "job").iterdir())
        same_world = all(record.world_after == args.nodes for record in summary.failures)
    different = [step for step in whole if found.get(step) != whole[step]]
    print(show(summary))
    good = code == 0 and not different and sorted(found) == list(range(args.steps)) and not any(left.values())
    print(
        f"\n{sum(soak.made.values())} faults ({soak.made}), ended with {code} after {wall_s:.0f} s; "
        f"{len(found)} of {args.steps} steps; {len(whole)} compared, {len(different)} differ"
        f"{'' if same_world else ' (the world shrank meanwhile)'}; left over: {left}; {'good' if good else 'NOT GOOD'}"
    )
    row = {
        "faults": soak.made, "exit_code": code, "wall_s": wall_s, "steps": len(found), "compared": len(whole),
        "different": different, "left_over": left, "files": files, "goodput": summary.shares.goodput,
        "shares_s": asdict(summary.shares), "failures": [asdict(record) for record in summary.failures],
    }  # fmt: skip
    write_report(args.out, f"{platform.platform()}, {os.cpu_count()} cores", [row])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
