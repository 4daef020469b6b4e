"""What the erasure code costs on one core, beside a copy of the same data.

    [PYTHONPATH=…] python benchmarks/erasure.py [--rounds 9] [--mib 128]

GB/s of data (k elements, parity not counted, whatever is made): encoding, and decoding with m data elements lost. The
yardstick is `numpy.copyto` of the same data in the same round, into pages that are already there; the sides take
turns, a figure is the median over rounds, a ratio the median of the ratios within a round. Beside ours: PyECLib's own
API (liberasurecode's Vandermonde and, where it loads, ISA-L backends), zfec where it is installed, and our numpy. Also
CRC-32C in pieces of 1 MiB, by google-crc32c and by ISA-L, on one thread and two; and what those two leave of the pace
of a thread that runs Python, as one that launches kernels does. Prints a table and writes
benchmarks/results/erasure.json.
"""

import argparse
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402

from benchmarks.report import write_report  # noqa: E402
from checkpoint import crc as checksums  # noqa: E402
from checkpoint.crc import crc32c, piece_crcs  # noqa: E402
from checkpoint.erasure import ReedSolomon, aligned_empty, isal  # noqa: E402

CODES = {(4, 1): 0.8, (8, 2): 0.6, (4, 2): None, (6, 2): None, (8, 3): None}
"""(k, m): least ratio to the copy that is aimed for."""
SLOW_BYTES = 16 << 20
"""Of data for the sides that take seconds for more: a rate does not depend on it once it is out of the cache."""

Side = Callable[[], object]


def rates(sides: dict[str, tuple[int, Side]], rounds: int) -> dict[str, list[float]]:
    """GB/s of each side by round; the first round, which warms up, is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            size, side = sides[name]
            start = time.perf_counter()
            side()
            found[name].append(size / (time.perf_counter() - start) / 1e9)
    return {name: values[1:] for name, values in found.items()}


def fill(size: int, generator: np.random.Generator) -> np.ndarray:
    array = aligned_empty(size)
    array[:] = generator.integers(0, 256, size, dtype=np.uint8)
    return array


def ours(k: int, m: int, data: list[np.ndarray], backend: str) -> dict[str, Side]:
    code = ReedSolomon(k, m, backend=backend)
    size = len(data[0])
    parity, out = [aligned_empty(size) for _ in range(m)], [aligned_empty(size) for _ in range(m)]
    code.encode(data, parity)
    left = {number: array for number, array in enumerate([*data, *parity]) if number >= m}
    lost = list(range(m))
    code.reconstruct(left, lost, out)
    assert all(np.array_equal(made, kept) for made, kept in zip(out, data, strict=False))
    return {"encode": lambda: code.encode(data, parity), "decode": lambda: code.reconstruct(left, lost, out)}


def pyeclib(k: int, m: int, data: list[np.ndarray], kind: str) -> dict[str, Side]:
    """Empty where this backend is not there."""
    from pyeclib.ec_iface import ECDriver, ECDriverError

    try:
        driver = ECDriver(k=k, m=m, ec_type=kind)
    except ECDriverError:
        return {}
    content = b"".join(array.tobytes() for array in data)
    fragments = driver.encode(content)
    assert driver.decode(fragments[m:]) == content
    return {"encode": lambda: driver.encode(content), "decode": lambda: driver.decode(fragments[m:])}


def zfec(k: int, m: int, data: list[np.ndarray]) -> dict[str, Side]:
    """Empty where it is not installed."""
    try:
        from zfec import Decoder, Encoder
    except ImportError:
        return {}
    encoder, decoder = Encoder(k, k + m), Decoder(k, k + m)
    blocks = [array.tobytes() for array in data]
    parity = list(encoder.encode(blocks, list(range(k, k + m))))
    # It wants the parity in the places of the lost blocks.
    left, numbers = [*parity, *blocks[m:]], [*range(k, k + m), *range(m, k)]
    assert decoder.decode(left, numbers) == blocks
    return {
        "encode": lambda: encoder.encode(blocks, list(range(k, k + m))),
        "decode": lambda: decoder.decode(left, numbers),
    }


def measure(k: int, m: int, total_bytes: int, rounds: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    size = total_bytes // k // 4096 * 4096
    data = [fill(size, generator) for _ in range(k)]
    small = [array[: SLOW_BYTES // k // 4096 * 4096] for array in data]
    source, target = fill(k * size, generator), aligned_empty(k * size)
    target[:] = 0
    codes = {"Atoll": (data, ours(k, m, data, "auto")), "numpy": (small, ours(k, m, small, "numpy"))}
    for kind in ("liberasurecode_rs_vand", "isa_l_rs_cauchy"):
        codes[f"PyECLib {kind}"] = (data, pyeclib(k, m, data, kind))
    codes["zfec"] = (small, zfec(k, m, small))
    sides: dict[str, tuple[int, Side]] = {"copy": (k * size, lambda: np.copyto(target, source))}
    for name, (arrays, acts) in codes.items():
        for act, side in acts.items():
            sides[f"{name}|{act}"] = (sum(len(array) for array in arrays), side)
    found = rates(sides, rounds)
    rows = []
    for key, values in found.items():
        if key != "copy":
            name, act = key.split("|")
            ratios = [value / copy for value, copy in zip(values, found["copy"], strict=True)]
            target_ratio = CODES[k, m] if name == "Atoll" else None
            rows.append(row(f"RS({k}+{m}) {act}", name, values, found["copy"], ratios, target_ratio))
    return rows


def measure_crc(total_bytes: int, rounds: int) -> list[dict[str, Any]]:
    payload = fill(total_bytes, np.random.default_rng(0))
    target = aligned_empty(total_bytes)
    target[:] = 0
    sides: dict[str, tuple[int, Side]] = {"copy": (total_bytes, lambda: np.copyto(target, payload))}
    starts = range(0, total_bytes, 1 << 20)
    sides["google-crc32c"] = (total_bytes, lambda: [crc32c(payload[s : s + (1 << 20)]) for s in starts])
    if isinstance(isal.load(), isal.Isal):
        sides["ISA-L"] = (total_bytes, lambda: piece_crcs(payload, 1 << 20))
        sides["ISA-L, 2 threads"] = (total_bytes, lambda: piece_crcs(payload, 1 << 20, threads=2))
    found = rates(sides, rounds)
    return [
        row("CRC-32C", name, values, found["copy"], [v / c for v, c in zip(values, found["copy"], strict=True)], None)
        for name, values in found.items()
        if name != "copy"
    ]


def measure_beside(total_bytes: int, rounds: int) -> list[dict[str, Any]]:
    """Two threads that check beside one that runs Python: as they do, and with a call from Python for each piece."""
    library, payload = isal.load(), fill(total_bytes, np.random.default_rng(0))
    if not isinstance(library, isal.Isal):
        return []
    sides: dict[str, Side | None] = {
        "nothing": None,
        "ISA-L, 2 threads, one call": lambda: piece_crcs(payload, 1 << 20, threads=2, niceness=10),
        "ISA-L, 2 threads, a call a piece": lambda: checksums._in_python(library, payload, 1 << 20, 2, 10),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(beside(side, total_bytes))
    alone = statistics.median(pace for pace, _ in found.pop("nothing"))
    return [
        {
            "what": "CRC-32C beside Python", "by": name,
            "gb_per_s": round(statistics.median(rate for _, rate in values), 2),
            "python_keeps": round(statistics.median(pace for pace, _ in values) / alone, 3),
        }
        for name, values in found.items()
    ]  # fmt: skip


def beside(side: Side | None, size_bytes: int, seconds: float = 0.3) -> tuple[float, float]:
    """Operations a second of a thread of Python while `side` runs again and again, and GB/s of `side`."""
    small, count, over = np.ones(64, dtype=np.float32), 0, threading.Event()

    def run_python() -> None:
        nonlocal count
        while not over.is_set():
            for _ in range(20):
                _ = small + small
            count += 20

    thread = threading.Thread(target=run_python)
    start, calls = time.perf_counter(), 0
    thread.start()
    while (taken := time.perf_counter() - start) < seconds:
        if side:
            side()
            calls += 1
        else:
            time.sleep(seconds)
    over.set()
    thread.join()
    return count / taken, calls * size_bytes / taken / 1e9


def row(
    what: str, name: str, values: list[float], copies: list[float], ratios: list[float], target: float | None
) -> dict[str, Any]:
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "what": what, "by": name, "gb_per_s": round(statistics.median(values), 2),
        "copy_gb_per_s": round(statistics.median(copies), 2), "ratio": round(ratio, 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)], "target": target,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=128, help="data of one call")
    parser.add_argument("--out", default=str(HERE / "results" / "erasure.json"))
    args = parser.parse_args()
    load = os.getloadavg()[0]
    rows, both = measure_crc(args.mib << 20, args.rounds), measure_beside(256 << 20, args.rounds)
    for k, m in CODES:
        rows += measure(k, m, args.mib << 20, args.rounds)
    print(f"{'':<16} {'by':<32} {'GB/s':>6} {'copy':>6} {'ratio':>6} {'quartiles':>15} {'target':>6}")
    for entry in rows:
        low, high = entry["ratio_quartiles"]
        print(
            f"{entry['what']:<16} {entry['by']:<32} {entry['gb_per_s']:6.2f} {entry['copy_gb_per_s']:6.2f} "
            f"{entry['ratio']:6.3f} {low:7.3f} {high:7.3f} {entry['target'] or '':>6}"
        )
    for entry in both:
        kept = f"Python keeps {entry['python_keeps']:.0%} of its pace"
        print(f"{entry['what']:<21} {entry['by']:<27} {entry['gb_per_s']:6.2f} {kept}")
    backend = ReedSolomon(2, 1).backend
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {backend}, load average {load:.1f} at the start"
    write_report(args.out, hardware, rows + both)


if __name__ == "__main__":
    main()
