"""A persisted checkpoint on one disk: saved and restored, beside the disk's own direct rate and torch DCP.

    python benchmarks/persist.py [--folder .] [--gib 4] [--rounds 3]

In every round, in turn, over the same bytes: plain O_DIRECT files from aligned memory (the yardstick, with as many
threads as our writer has, fsync at the end), `Checkpoints` (from `save` to the commit, the copy to the staging buffer
included; open, and an engine's pieces filled where they lie, every chunk checked), and `torch.distributed.checkpoint`
of the same tensors with files synced (`save`, `load`). All write new files; deleting the ones before, which
`Checkpoints` does after the commit, has a figure of its own. What is read was dropped from the page cache before, and
zeroed where it is to be. Of the first save, which also faults the staging buffers in, nothing is counted. A figure is
the median over rounds, a ratio the median of the ratios within a round. Prints a table and writes
benchmarks/results/persist.json.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from benchmarks.report import write_report  # noqa: E402
from checkpoint import CheckpointOptions, Checkpoints  # noqa: E402
from checkpoint.crc import Bytes  # noqa: E402
from checkpoint.erasure import aligned_empty  # noqa: E402
from checkpoint.persisted.chunks import THREADS  # noqa: E402
from offload.state import Piece  # noqa: E402

KINDS = ("master", "exp_avg", "exp_avg_sq")
FILE_BYTES = 64 << 20


def state(total_bytes: int) -> list[Piece]:
    """A transformer's uneven parameters with fp32 masters and moments, in the order of an engine's units."""
    sizes, found = [4096 * 4096, 4096 * 1024, 4096 * 1024, 4096 * 4096, 11008 * 4096, 4096], []
    number, left = 0, total_bytes // (4 * len(KINDS))
    while left > 0:
        size = min(sizes[number % len(sizes)], left)
        for kind in KINDS:
            tensor = torch.empty(size).uniform_(-1, 1)
            found.append(Piece(name=f"p{number}", kind=kind, start=0, stop=size, shape=(size,), tensor=tensor))
        number, left = number + 1, left - size
    return found


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


class Direct:
    """Plain files, written and read with O_DIRECT."""

    def __init__(self, folder: Path, total_bytes: int) -> None:
        self.folder, self.count = folder / "direct", total_bytes // FILE_BYTES
        self._free: SimpleQueue[Bytes] = SimpleQueue()
        for number in range(THREADS):
            buffer = aligned_empty(FILE_BYTES)
            buffer[:] = number + 1
            self._free.put(buffer)
        self.bytes, self.tensors = self.count * FILE_BYTES, ()

    def _all(self, act: Callable[[Bytes, Path], None]) -> None:
        def do(number: int) -> None:
            buffer = self._free.get()
            act(buffer, self.folder / str(number))
            self._free.put(buffer)

        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(do, range(self.count)):
                pass

    def save(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self._all(self._write)

    def _write(self, buffer: Bytes, path: Path) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        assert os.write(fd, buffer.data) == FILE_BYTES
        os.fsync(fd)
        os.close(fd)

    def load(self) -> None:
        self._all(self._read)

    def _read(self, buffer: Bytes, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        assert os.preadv(fd, [buffer.data], 0) == FILE_BYTES
        os.close(fd)


class Ours:
    def __init__(self, folder: Path, pieces: list[Piece]) -> None:
        self.folder, self.pieces = folder / "atoll", pieces
        self.tensors = [piece.tensor for piece in pieces]
        self.bytes = sum(piece.tensor.nbytes for piece in pieces)
        self.checkpoints = Checkpoints(str(self.folder), CheckpointOptions())
        self.step = 0
        self.stalls_s: list[float] = []

    def save(self) -> None:
        self.step += 1
        start = time.perf_counter()
        self.checkpoints.save(self.step, self.pieces, {}, {"step": self.step})
        if self.step > 1:
            self.stalls_s.append(time.perf_counter() - start)
        self.checkpoints.wait()
        if self.checkpoints.error():
            sys.exit(str(self.checkpoints.error()))

    def load(self) -> None:
        self.checkpoints.open(self.step).fill(self.pieces)  # as an engine does: into the memory that is there


class Dcp:
    def __init__(self, folder: Path, pieces: list[Piece]) -> None:
        self.folder = folder / "dcp"
        self.state = {f"{piece.name}/{piece.kind}": piece.tensor for piece in pieces}
        self.tensors = list(self.state.values())
        self.bytes = sum(tensor.nbytes for tensor in self.tensors)

    def save(self) -> None:
        from torch.distributed import checkpoint as dcp

        shutil.rmtree(self.folder, ignore_errors=True)
        writer = dcp.FileSystemWriter(self.folder, thread_count=THREADS, sync_files=True)
        dcp.save(self.state, storage_writer=writer, no_dist=True)

    def load(self) -> None:
        from torch.distributed import checkpoint as dcp

        dcp.load(self.state, storage_reader=dcp.FileSystemReader(self.folder), no_dist=True)


def measure(sides: dict[str, Any], rounds: int) -> tuple[list[dict[str, Any]], float]:
    """Rows, and seconds a GB to delete."""
    delete_s: list[float] = []
    found: dict[tuple[str, str], list[float]] = {}
    used: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):  # the first warms up
        order = list(sides.items())
        for name, side in order if number % 2 else reversed(order):
            for act in ("save", "load"):
                if act == "load":
                    drop_from_cache(side.folder)
                    for tensor in side.tensors:
                        tensor.zero_()
                os.sync()
                start, cpu = time.perf_counter(), time.process_time()
                getattr(side, act)()
                seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
                if number:
                    found.setdefault((name, act), []).append(side.bytes / seconds / 1e9)
                    used.setdefault((name, act), []).append(1e9 * cpu / side.bytes)
            start = time.perf_counter()
            shutil.rmtree(side.folder)
            if number:
                delete_s.append((time.perf_counter() - start) * 1e9 / side.bytes)
    rows: list[dict[str, Any]] = []
    for (name, act), values in found.items():
        ratios = [value / direct for value, direct in zip(values, found["direct", act], strict=True)]
        rows.append(
            {
                "what": act,
                "by": name,
                "gb_per_s": round(statistics.median(values), 3),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
                "cpu_s_per_gb": round(statistics.median(used[name, act]), 3),
                "target": 0.8 if name == "Atoll" else None,
            }  # fmt: skip
        )
    rows.sort(key=lambda row: (row["what"] != "save", list(sides).index(row["by"])))
    return rows, statistics.median(delete_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".", help="on the disk that is measured")
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-dcp", dest="dcp", action="store_false")
    parser.add_argument("--out", default=str(HERE / "results" / "persist.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    load = os.getloadavg()[0]
    pieces = state(int(args.gib * (1 << 30)))
    before = [piece.tensor.clone() for piece in pieces[:6]]
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="atoll-bench-") as name:
        folder = Path(name)
        ours = Ours(folder, pieces)
        sides: dict[str, Any] = {"direct": Direct(folder, ours.bytes), "Atoll": ours}
        if args.dcp:
            sides["torch DCP"] = Dcp(folder, pieces)
        rows, delete_s = measure(sides, args.rounds)
        ours.checkpoints.close()
    assert all(torch.equal(kept, piece.tensor) for kept, piece in zip(before, pieces, strict=False))
    for row in rows:
        print(
            f"{row['what']:5} {row['by']:10} {row['gb_per_s']:7.3f} GB/s  ratio {row['ratio']:.3f}  {row['ratios']}  "
            f"CPU {row['cpu_s_per_gb']:.3f} s/GB"
        )
    print(
        f"{ours.bytes / 1e9:.2f} GB; training stood still for the copy: {statistics.median(ours.stalls_s):.2f} s; "
        f"deleting: {delete_s:.2f} s/GB"
    )
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, load average {load:.1f} at the start"
    stalls = [round(stall, 3) for stall in sorted(ours.stalls_s)]
    others = [
        {"what": "stall", "bytes": ours.bytes, "stalls_s": stalls},
        {"what": "delete", "s_per_gb": round(delete_s, 3)},
    ]
    write_report(args.out, hardware, rows + others)


if __name__ == "__main__":
    main()
