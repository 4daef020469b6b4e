"""What crosses slow links, and how long a step takes: this engine beside FSDP2, HSDP, DDP and DeepSpeed.

    sudo python benchmarks/slow_link.py [--mesh 2x2 2x2x2] [--job linear llama] [--rates 50 200 400 1000]
        [--accumulation 1 4 16] [--engines NAME ...] [--rounds N] [--budget-s S] [--resume] [--smoke]

Ranks are processes in network namespaces whose links are shaped (`namespaces`), gloo between them, one thread each. For
every mesh, job and engine (`slow_link_engines`), overlap on and off for ours:

1. the losses of four steps must agree with a plain loop's;
2. a step at each accumulation, links not limited: bytes, and compute plus overhead;
3. at each rate: time. How many steps follows from 2; a step that would take longer than ``--longest`` is left out and
   said so. ``--rounds`` goes over everything again, in reverse order; a time is the median over rounds of a round's
   mean step, what is still under way after its last step included.

``--rates`` are Mbit/s of the slowest level; each level inside it has links ``--ratio`` times as fast. Bytes are those
that the interfaces count; ours are held to the cost model's. Rows go to ``--out`` as they come: stop it at any time,
``--resume`` does what is missing.
Prints bytes, then times; the last line is one JSON object. ``--resume --rounds 0`` prints what there is.
"""

import argparse
import itertools
import json
import math
import os
import platform
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.namespaces import Network, measure, parse_levels  # noqa: E402
from benchmarks.report import write_report  # noqa: E402
from benchmarks.slow_link_engines import ENGINES, JOBS  # noqa: E402

Row = dict[str, Any]
PORT = 29500
SMOKE = ["atoll-zero3", "atoll-topo", "fsdp2-repaired", "hsdp-bf16", "ddp-bf16", "deepspeed-hpz"]
_PAYLOAD = 1448 / 1514
"""Of a frame at 1500 bytes MTU: what the shapers count and the interfaces, seeing unsegmented bursts, do not."""


class CellFailed(Exception):
    """An engine did not build, agree or answer in time; its ranks are of no more use."""


@dataclass(frozen=True)
class Cell:
    """One engine that is built once and measured at every accumulation and rate."""

    mesh: str
    job: str
    engine: str
    overlap: bool

    def __str__(self) -> str:
        return f"{self.mesh} {self.job} {self.engine}{'' if self.overlap else ', overlap off'}"


class World:
    """The ranks of a mesh, one process each, inside the network's nodes."""

    def __init__(self, network: Network, program: Path = HERE / "slow_link_worker.py") -> None:
        self.network = network
        self.generation = 0
        self._log = tempfile.TemporaryFile("w+")
        self._processes: list[subprocess.Popen[str]] = []
        self._answers: list[int] = []
        world = network.num_nodes * network.ranks_per_node
        env = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        network.set_rates({})
        for rank in range(world):
            read, write = os.pipe()
            command = [sys.executable, str(program), os.getpid(), "--rank", rank, "--world", world]
            command += ["--address", network.address(0), "--port", PORT, "--answers", write]
            self._processes.append(subprocess.Popen(
                network.command(rank // network.ranks_per_node, *map(str, command)), stdin=subprocess.PIPE,
                stdout=self._log, stderr=self._log, env=env, pass_fds=(write,), text=True,
            ))  # fmt: skip
            os.close(write)
            self._answers.append(read)
        self.pids: list[int] = [answer["pid"] for answer in self._collect(120)]
        """Of the ranks."""

    def renew(self) -> None:
        """New processes, with nothing of what was. CellFailed where they do not come."""
        self.generation = 0
        self.pids = [answer["pid"] for answer in self.do(60, do="renew")]

    def do(self, timeout_s: float, **command: Any) -> list[dict[str, Any]]:
        """Every rank's answer. CellFailed for an error, a death or none in time."""
        for process in self._processes:
            assert process.stdin is not None
            try:
                print(json.dumps(command), file=process.stdin, flush=True)
            except BrokenPipeError:
                raise CellFailed(f"a rank has ended: {self._tail()}") from None
        return self._collect(timeout_s)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            process.stdin.close()  # type: ignore[union-attr]
        for answers in self._answers:
            os.close(answers)
        self._log.close()

    def _collect(self, timeout_s: float) -> list[dict[str, Any]]:
        texts, deadline = [b""] * len(self._answers), time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for rank, answers in enumerate(self._answers):
                selector.register(answers, selectors.EVENT_READ, rank)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise CellFailed(
                        f"no answer in {timeout_s:.0f} s from ranks {[k.data for k in selector.get_map().values()]}"
                    )
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    texts[key.data] += chunk
                    if not chunk:
                        raise CellFailed(f"rank {key.data} has ended: {self._tail()}")
                    if texts[key.data].endswith(b"\n"):
                        selector.unregister(key.fd)
                        if "error" in (answer := json.loads(texts[key.data])):
                            print(answer["trace"], file=sys.stderr)
                            raise CellFailed(f"rank {key.data}: {answer['error']}")
        return [json.loads(text)["ok"] for text in texts]

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-1500:]


class Bench:
    """Goes over the cells, and keeps the rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.failures: list[str] = []
        self.until: float = time.monotonic() + args.budget_s
        load = os.getloadavg()[0]
        control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
        self.hardware = (
            f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, TCP {control}, "
            f"load average {load:.1f} at the start"
        )
        if args.resume and Path(args.out).exists():
            for row in json.loads(Path(args.out).read_text())["rows"]:
                self.rows[_key(row)] = row

    def run(self) -> None:
        for number in range(self.args.rounds):
            for mesh in self.args.mesh:
                with Network(parse_levels(mesh)) as network:
                    if number == 0:
                        self._measure_links(mesh, network)
                    self._round(number, mesh, network)

    def rates(self, network: Network, rate: float) -> dict[str, float]:
        return {level: rate * self.args.ratio**depth for depth, level in enumerate(network.linked)}

    def _measure_links(self, mesh: str, network: Network) -> None:
        for rate in self.args.rates:
            asked = self.rates(network, rate)
            row = {"kind": "links", "mesh": mesh, "rate": rate, "asked_mbit": asked}
            if _key(row) not in self.rows:
                row["payload_mbit"] = measure(network, list(asked.values()))
                self._keep(row)
            row = self.rows[_key(row)]
            got = [f"{level} {mbit:g} of {asked.get(level, 'no limit')}" for level, mbit in row["payload_mbit"].items()]
            _say(f"{mesh} links at {rate:g}, Mbit/s of payload: {', '.join(got)}")

    def _round(self, number: int, mesh: str, network: Network) -> None:
        cells = [cell for cell in self._cells(mesh, network) if self._missing(cell, number)]
        world: World | None = None
        try:
            for cell in cells if number % 2 == 0 else reversed(cells):
                if self.over():
                    _say(f"round {number} ends before {cell}: more than --budget-s={self.args.budget_s:g}")
                    break
                own = ENGINES[cell.engine].own_world
                try:
                    if world is not None and (own or world.generation < 0):
                        world.renew()
                    world = world or World(network)
                    self._measure(cell, number, world)
                    if own:
                        world.generation = -1  # not for another engine
                except CellFailed as error:
                    self._fail(cell, str(error))
                    if world is not None:
                        world.close()
                    world = None
        finally:
            if world is not None:
                world.close()

    def _cells(self, mesh: str, network: Network) -> Iterator[Cell]:
        names = []
        for name in self.args.engines:
            if missing := ENGINES[name].missing():
                _say(f"{mesh} {name}: left out: this version has no parallel.{', parallel.'.join(missing)}")
            elif len(network.levels) < ENGINES[name].min_levels:
                _say(f"{mesh} {name}: left out: it needs {ENGINES[name].min_levels} levels")
            else:
                names.append(name)
        for job, name in itertools.product(self.args.job, names):
            for overlap in ENGINES[name].overlaps:
                yield Cell(mesh, job, name, overlap)

    def _missing(self, cell: Cell, number: int) -> bool:
        """Whether a measurement of this round is not in the rows yet."""
        for accumulation, rate in itertools.product(self.args.accumulation, self.args.rates):
            row = self.rows.get((*vars(cell).values(), accumulation, rate), {})
            if "skipped" not in row and len(row.get("rounds_s", ())) <= number:
                return True
        return False

    def _measure(self, cell: Cell, number: int, world: World) -> None:
        args, network, started = self.args, world.network, time.monotonic()
        network.set_rates({})
        world.generation += 1
        levels = {"levels": network.levels, "generation": world.generation}
        built = world.do(90, do="build", job=cell.job, engine=cell.engine, overlap=cell.overlap, **levels)
        facts = self._check(cell, world) | {"model_bytes": built[0]["model_bytes"]}
        for accumulation in args.accumulation:
            if self.over():
                break
            free_s, sent = self._time(world, accumulation, steps=2 if accumulation < 8 else 1)[:2]
            for rate in args.rates:
                if self.over():
                    break
                row = {"kind": "step", **vars(cell), "accumulation": accumulation, "rate": rate, **facts}
                row |= {"bytes": _describe(sent, network), "unlimited_s": free_s}
                row = self.rows.get(_key(row), row)
                if len(row.get("rounds_s", ())) > number or "skipped" in row:
                    continue
                rates = self.rates(network, rate)
                wire_s = max(max(sent[level]) * 8e-6 / (mbit * _PAYLOAD) for level, mbit in rates.items())
                if wire_s > args.longest:
                    row["skipped"] = (
                        f"its bytes alone would take {wire_s:.0f} s a step, more than --longest={args.longest:g}"
                    )
                    _say(f"{cell}, accumulation {accumulation}, {rate:g} Mbit/s: left out: {row['skipped']}")
                    self._keep(row)
                    continue
                network.set_rates(rates)
                predicted = wire_s + free_s
                if predicted < args.seconds / 2:  # lets TCP find the rate; a long step does within itself
                    self._time(world, accumulation, steps=1)
                steps = max(1, min(10, round(args.seconds / predicted)))
                step_s, at_rate, steps_s = self._time(world, accumulation, steps)
                row.setdefault("rounds_s", []).append(step_s)
                row.setdefault("steps_s", []).append(steps_s)
                row |= {"step_s": statistics.median(row["rounds_s"]), "wire_s": wire_s, "dropped": network.dropped()}
                row["bytes"] = _describe(at_rate, network)
                self._keep(row)
                network.set_rates({})
        world.do(60, do="drop")
        _say(f"{cell}: {time.monotonic() - started:.0f} s")

    def over(self) -> bool:
        return time.monotonic() > self.until

    def _check(self, cell: Cell, world: World) -> Row:
        """Compare with the plain loop."""
        answers = world.do(120, do="check")
        plain = answers[0]["plain"]
        ours = [statistics.fmean(losses) for losses in zip(*(a["losses"] for a in answers), strict=True)]
        error = max(abs(mine - its) / abs(its) for mine, its in zip(ours, plain, strict=True))
        tolerance = ENGINES[cell.engine].tolerance
        if not error <= tolerance:
            raise CellFailed(
                f"losses are {error:.1e} from a plain loop's, more than {tolerance:g}: {ours}, not {plain}"
            )
        return {"loss_error": error, "optimizer_bytes": [answer["optimizer_bytes"] for answer in answers]}

    def _time(self, world: World, accumulation: int, steps: int) -> tuple[float, dict[str, list[float]], list[float]]:
        """Seconds a step, bytes a step by level and unit, and rank 0's seconds step by step."""
        before = world.network.sent()
        limit = 60 + 3 * self.args.longest * steps
        answers = world.do(limit, do="time", accumulation=accumulation, steps=steps)
        after = world.network.sent()
        sent = {k: [(b - a) / steps for a, b in zip(before[k], after[k], strict=True)] for k in after}
        return answers[0]["total_s"] / steps, sent, answers[0]["steps_s"]

    def _fail(self, cell: Cell, reason: str) -> None:
        self.failures.append(f"{cell}: {reason}")
        _say(f"{cell}: FAILED: {reason}")

    def _keep(self, row: Row) -> None:
        self.rows[_key(row)] = row
        write_report(self.args.out, self.hardware, list(self.rows.values()))


def _key(row: Row) -> tuple[Any, ...]:
    if row["kind"] == "links":
        return row["mesh"], row["rate"]
    return tuple(row[name] for name in ("mesh", "job", "engine", "overlap", "accumulation", "rate"))


def _describe(sent: dict[str, list[float]], network: Network) -> Row:
    """Bytes a step by level.

    sent: by each of the level's units through its link, least and most; the innermost level's unit is the node.
    per_node: a node's mean share of what stayed inside the level's parent, for comparison with a cost model: what
    crosses a rack's link also crosses a node's, and is counted at the rack alone.
    """
    row: Row = {"sent": {level: [min(units), max(units)] for level, units in sent.items()}, "per_node": {}}
    outer = 0.0
    for level, units in sent.items():
        mean = sum(units) / network.num_nodes
        innermost = level == list(sent)[-1]
        row["per_node"][level] = mean if innermost else mean - outer
        outer = mean
    return row


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------- the tables


def print_tables(rows: Sequence[Row]) -> None:
    steps = [row for row in rows if row["kind"] == "step"]
    for mesh, job in dict.fromkeys((row["mesh"], row["job"]) for row in steps):
        these = [row for row in steps if (row["mesh"], row["job"]) == (mesh, job)]
        size = these[0]["model_bytes"]
        accumulations = sorted({row["accumulation"] for row in these})
        rates = sorted({row["rate"] for row in these})
        sides = list(dict.fromkeys((row["engine"], row["overlap"]) for row in these))
        levels = list(these[0]["bytes"]["sent"])
        print(f"\n{mesh}, {job}, {size / 1e6:.1f} MB of fp32 weights.")
        print(f"Bytes a step that leave each {' / '.join(levels[:-1])}, largest, in units of the model;")
        print("the share of the optimizer's state that a rank holds; loss against a plain loop")
        print(f"{'':26s}" + "".join(f"{f'x{a}':>16s}" for a in accumulations) + f"{'state':>8s} {'loss':>8s}")
        for name, overlap in sides:
            mine = [row for row in these if (row["engine"], row["overlap"]) == (name, overlap)]
            if not overlap and len(mine) < len([r for r in these if r["engine"] == name]):
                continue  # the same bytes
            cells = []
            for accumulation in accumulations:
                found = [row["bytes"]["sent"] for row in mine if row["accumulation"] == accumulation]
                text = " / ".join(f"{found[0][level][1] / size:.2f}" for level in levels[:-1]) if found else "-"
                cells.append(f"{text:>16s}")
            share = max(mine[0]["optimizer_bytes"]) / (2 * size)
            print(f"{name:26s}" + "".join(cells) + f"{share:8.2f} {mine[0]['loss_error']:8.0e}")
        print(f"\n{mesh}, {job}: ms a step at " + ", ".join(f"{rate:g}" for rate in rates) + " Mbit/s (-: left out)")
        print(f"{'':26s}" + "".join(f"{f'x{a}':>{8 * len(rates)}s}" for a in accumulations))
        by_key = {_key(row): row for row in these}
        for name, overlap in sides:
            cells = []
            for accumulation, rate in itertools.product(accumulations, rates):
                row = by_key.get((mesh, job, name, overlap, accumulation, rate), {})
                cells.append(f"{1e3 * row['step_s']:8.0f}" if "step_s" in row else f"{'-':>8s}")
            print(f"{name + ('' if overlap else ' (no overlap)'):26s}" + "".join(cells))


def bytes_errors(rows: Sequence[Row]) -> dict[str, float]:
    """How far the bytes of our rows are from the cost model's, by row and level, as a part of the latter."""
    errors = {}
    for row in rows:
        sends = ENGINES[row["engine"]].sends
        if sends is None or "step_s" not in row:
            continue
        levels = parse_levels(row["mesh"])
        ranks = list(levels.values())[-1]
        for level, expected in sends(JOBS[row["job"]], levels, row["accumulation"]).items():
            if expected:
                where = f"{row['mesh']} {row['job']} {row['engine']} x{row['accumulation']} {row['rate']:g} {level}"
                errors[where] = row["bytes"]["per_node"][level] / (expected * ranks) - 1
    return errors


def summary(bench: Bench) -> Row:
    """The benchmark's last line: how many rows, what failed, and our times against two baselines."""
    rows = [row for row in bench.rows.values() if row["kind"] == "step"]
    times = {_key(row): row["step_s"] for row in rows if "step_s" in row}
    ratios: Row = {}
    for key, mine in times.items():
        mesh, job, name, overlap, accumulation, rate = key
        if name.startswith("atoll-") and overlap:
            for baseline in ("fsdp2-repaired", "hsdp-bf16", "hsdp-bf16-reduce"):
                if its := times.get((mesh, job, baseline, True, accumulation, rate)):
                    place = f"{mesh} {job} x{accumulation} {rate:g}"
                    ratios.setdefault(place, {}).setdefault(name, {})[baseline] = round(its / mine, 2)
    off = bytes_errors(rows)
    worst = max(off, key=lambda where: abs(off[where]), default="")
    print(
        f"\nour bytes, {len(off)} figures by row and level, are within {abs(off.get(worst, 0)):.2%} of the cost model "
        f"({worst})"
    )
    return {
        "rows": len(rows), "measured": len(times), "left_out": len([r for r in rows if "skipped" in r]),
        "bytes_off_the_model": round(off.get(worst, 0.0), 4),
        "failed": bench.failures, "times_faster_than": ratios, "out": bench.args.out,
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", nargs="+", default=["2x2"], help="nodes x ranks, or racks x nodes x ranks")
    parser.add_argument("--job", "--workload", nargs="+", default=["linear"], choices=JOBS)
    parser.add_argument("--rates", nargs="+", type=float, default=[50.0, 200.0, 400.0, 1000.0])
    parser.add_argument("--ratio", type=float, default=4.0, help="how much faster the links of each level inside are")
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, metavar="NAME",
                        help=", ".join(ENGINES))  # fmt: skip
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on timing each row, if a step allows")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds on the wire; a longer step is left out")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="no further row is begun after this")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --out and measure the others")
    parser.add_argument("--smoke", action="store_true", help="one engine of each kind, quickly, into a temporary file")
    parser.add_argument("--out", default=str(HERE / "results" / "slow_link.json"))
    args = parser.parse_args()
    args.engines = args.engines or (SMOKE if args.smoke else list(ENGINES))
    if args.smoke:
        args.rates, args.accumulation, args.rounds, args.seconds = [1000.0], [2], 1, 0.1
        args.out = str(Path(tempfile.mkdtemp(prefix="slow_link_")) / "smoke.json")
    for mesh in args.mesh:
        parse_levels(mesh)
    return args


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was built is taken away
    bench = Bench(args)
    bench.run()
    print_tables(list(bench.rows.values()))
    print(json.dumps(summary(bench)))
    if bench.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
