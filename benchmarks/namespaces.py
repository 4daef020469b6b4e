"""Nodes of a cluster as network namespaces on one machine, with real slow links between them. Needs root and iproute2.

    python benchmarks/namespaces.py 2x2x2 --rates 200 800    # builds it, measures every level, takes it away

[Note: topology] Levels are named slowest first; the innermost one are ranks that share a node, all the others have
links. Each node is a namespace with one interface, ``eth0``. Everything else lies in one more namespace, the fabric:
a bridge for every group of nodes, joined upwards by veth pairs. Both ends of a link are shaped by ``tc tbf``, so a link
is full duplex, and `set_rates` changes it while connections are open. For {rack: 2, node: 2, rank: 2}:

    node 0 eth0 === n0 |bridge b0| u0 === d0 |bridge core| d1 === u1 |bridge b1| n2 === eth0 node 2
    node 1 eth0 === n1 |         |           |           |           |         | n3 === eth0 node 3

Names of namespaces carry the process that made them and its start time: two runs do not meet, and what a killed run
left behind is removed by the next one. All that lives in a namespace goes with it, so nothing else is to be cleaned.
"""

import argparse
import ctypes
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

NETNS = Path("/run/netns")
PREFIX = "atoll"
SUBNET, PORT = "10.77", 29400
LEVEL_NAMES = {2: ("node", "rank"), 3: ("rack", "node", "rank")}
_SETTLE_S = 0.4
"""Of a bandwidth measurement, not counted: the bucket's burst and TCP's start."""


def parse_levels(text: str) -> dict[str, int]:
    """``2x2x2`` as ``{rack: 2, node: 2, rank: 2}``."""
    sizes = [int(size) for size in text.split("x")] if re.fullmatch(r"\d+(x\d+)+", text) else []
    if len(sizes) not in LEVEL_NAMES or min(sizes) < 1:
        raise ValueError(f"--mesh={text}: give nodes x ranks or racks x nodes x ranks, such as 2x2 or 2x2x2")
    return dict(zip(LEVEL_NAMES[len(sizes)], sizes, strict=True))


@dataclass(frozen=True)
class _Link:
    """One shaped end: what leaves through this interface of this namespace."""

    namespace: str
    interface: str
    level: str


class Network:
    """The namespaces of one run; a context manager."""

    def __init__(self, levels: Mapping[str, int]) -> None:
        """levels: sizes by name, slowest first; the last one are ranks of a node. RuntimeError without root."""
        if os.geteuid() != 0:
            raise RuntimeError("network namespaces need root: run this with sudo")
        remove_stale()
        self.levels = dict(levels)
        self.linked = tuple(levels)[:-1]
        """The levels with links, slowest first."""
        self.ranks_per_node = tuple(levels.values())[-1]
        self.num_nodes = math.prod(tuple(levels.values())[:-1])
        self._prefix = f"{PREFIX}-{os.getpid()}-{_start_time(os.getpid())}"
        self._fabric = f"{self._prefix}-fabric"
        self._up: list[_Link] = []
        self._down: list[_Link] = []
        self._shaped = False

    def __enter__(self) -> "Network":
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove every namespace. Processes in them must have ended, or they keep theirs alive, nameless."""
        for path in NETNS.glob(f"{self._prefix}-*"):
            _run("ip", "netns", "del", path.name)

    def namespace(self, node: int) -> str:
        return f"{self._prefix}-n{node}"

    def address(self, node: int) -> str:
        return f"{SUBNET}.{node // 250}.{node % 250 + 1}"

    def command(self, node: int, *command: str) -> list[str]:
        """`command` inside a node; its ``/sys/class/net`` shows the node's interfaces."""
        return ["ip", "netns", "exec", self.namespace(node), *command]

    def set_rates(self, rates_mbit: Mapping[str, float]) -> None:
        """Shape both ends of each level's links, in Mbit/s; levels that are not named get no limit."""
        for namespace in dict.fromkeys(link.namespace for link in self._up + self._down):
            lines = []
            for link in self._up + self._down:
                if link.namespace != namespace:
                    continue
                if rate := rates_mbit.get(link.level):
                    lines.append(f"qdisc replace dev {link.interface} root tbf {_tbf(rate)}")
                elif self._shaped:
                    lines.append(f"qdisc replace dev {link.interface} root pfifo limit 10000")
            _run("tc", "-n", namespace, "-b", "-", text="\n".join(lines) + "\n")
        self._shaped = True

    def sent(self) -> dict[str, list[int]]:
        """Bytes sent so far by level: a list over that level's units, of what left each of them through its link.

        For the innermost level: what each node sent to itself. Frames as the kernel counts them: a burst that is
        segmented by the hardware, or here by the shaper, carries one header.
        """
        stats = {ns: _links(ns) for ns in dict.fromkeys(link.namespace for link in self._up)}
        counts: dict[str, list[int]] = {level: [] for level in self.levels}
        for link in self._up:
            counts[link.level].append(stats[link.namespace][link.interface])
        counts[tuple(self.levels)[-1]] = [stats[self.namespace(node)]["lo"] for node in range(self.num_nodes)]
        return counts

    def dropped(self) -> int:
        """Packets that the shapers threw away since the last `set_rates`: each was sent again."""
        total = 0
        for namespace in dict.fromkeys(link.namespace for link in self._up + self._down):
            total += sum(
                qdisc.get("drops", 0) for qdisc in json.loads(_run("tc", "-n", namespace, "-s", "-j", "qdisc"))
            )
        return total

    def bandwidth(self, level: str, seconds: float = 1.0) -> float:
        """TCP payload in Mbit/s from node 0 to the nearest node that lies across a link of `level`."""
        sizes = tuple(self.levels.values())
        position = tuple(self.levels).index(level)
        other = math.prod(sizes[position + 1 : -1]) if position < len(sizes) - 1 else 0
        here = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), "--parent", str(os.getpid())]
        receiver = subprocess.Popen(
            self.command(other, *here, "--receive", str(seconds)), stdout=subprocess.PIPE, text=True
        )
        sender = subprocess.Popen(self.command(0, *here, "--send", self.address(other), str(seconds)))
        try:
            output, _ = receiver.communicate(timeout=seconds + 15)
        finally:
            for process in (receiver, sender):
                process.kill()
                process.wait()
        return float(output)

    # ------------------------------------------------------------------------------------------------ building

    def _build(self) -> None:
        _run("ip", "netns", "add", self._fabric)
        sizes = tuple(self.levels.values())[:-1]
        fabric = ["link add core type bridge mcast_snooping 0", "link set core up"]
        # one bridge for every group of each level but the innermost linked one, from the top
        for depth in range(1, len(sizes)):
            for group in range(math.prod(sizes[:depth])):
                here, up, down = f"b{depth}g{group}", f"u{depth}g{group}", f"d{depth}g{group}"
                above = "core" if depth == 1 else f"b{depth - 1}g{group // sizes[depth - 1]}"
                fabric += [
                    f"link add {here} type bridge mcast_snooping 0",
                    f"link set {here} up",
                    f"link add {up} type veth peer name {down}",
                    f"link set {up} master {here} up",
                    f"link set {down} master {above} up",
                ]
                self._up.append(_Link(self._fabric, up, self.linked[depth - 1]))
                self._down.append(_Link(self._fabric, down, self.linked[depth - 1]))
        for node in range(self.num_nodes):
            namespace = self.namespace(node)
            bridge = "core" if len(sizes) == 1 else f"b{len(sizes) - 1}g{node // sizes[-1]}"
            _run("ip", "netns", "add", namespace)
            fabric += [
                f"link add n{node} type veth peer name eth0 netns {namespace}",
                f"link set n{node} master {bridge} up",
            ]
            self._up.append(_Link(namespace, "eth0", self.linked[-1]))
            self._down.append(_Link(self._fabric, f"n{node}", self.linked[-1]))
        _run("ip", "-n", self._fabric, "-b", "-", text="\n".join(fabric) + "\n")
        for node in range(self.num_nodes):
            # no IPv6: its neighbour discovery would be counted
            _run(*self.command(node, "sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1"))
            inside = ["link set lo up", f"addr add {self.address(node)}/16 dev eth0", "link set eth0 up"]
            _run("ip", "-n", self.namespace(node), "-b", "-", text="\n".join(inside) + "\n")


def remove_stale() -> None:
    """Remove the namespaces of runs that are no more."""
    for path in NETNS.glob(f"{PREFIX}-*"):
        if match := re.fullmatch(rf"{PREFIX}-(\d+)-(\d+)-\w+", path.name):
            if _start_time(int(match[1])) != match[2]:
                try:
                    _run("ip", "netns", "del", path.name)
                except RuntimeError:
                    if path.exists():  # else another run was faster
                        raise


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which started it, ends, however it does. Call it first."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        raise SystemExit("the starting process has ended")


def _start_time(pid: int) -> str | None:
    """Ticks since boot at which a process started; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _tbf(rate_mbit: float) -> str:
    """A burst of 2 ms, but room for one 64 KiB segment; a queue of 100 ms, but room for the flows of several ranks."""
    bytes_per_s = rate_mbit * 1e6 / 8
    burst, limit = max(70_000, int(bytes_per_s * 0.002)), max(4 << 20, int(bytes_per_s * 0.1))
    return f"rate {rate_mbit:g}mbit burst {burst} limit {limit}"


def _links(namespace: str) -> dict[str, int]:
    """Bytes sent by interface."""
    return {
        link["ifname"]: int(link["stats64"]["tx"]["bytes"])
        for link in json.loads(_run("ip", "-n", namespace, "-s", "-j", "link"))
    }


def _run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        given = f" given {text!r}" if text else ""
        raise RuntimeError(f"{' '.join(command)}{given} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _receive(seconds: float) -> None:
    with socket.create_server(("", PORT)) as server:
        server.settimeout(10)
        connection, _ = server.accept()
    buffer, received, start, end = bytearray(1 << 20), 0, 0.0, time.perf_counter() + _SETTLE_S
    while not start or time.perf_counter() < end:
        count = connection.recv_into(buffer)
        if start:
            received += count
        elif time.perf_counter() >= end:
            start = time.perf_counter()
            end = start + seconds
        if not count:
            raise SystemExit("the sender ended too early")
    print(received * 8 / 1e6 / (time.perf_counter() - start))


def _send(address: str, seconds: float) -> None:
    end = time.perf_counter() + seconds + 10
    while True:
        try:
            connection = socket.create_connection((address, PORT), timeout=10)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    payload = bytes(1 << 20)
    try:
        while time.perf_counter() < end:
            connection.sendall(payload)
    except OSError:  # the receiver has seen enough
        pass


def measure(network: Network, rates_mbit: Sequence[float]) -> dict[str, float]:
    """Set the rates (one a linked level) and measure each level, the innermost too; Mbit/s of TCP payload."""
    network.set_rates(dict(zip(network.linked, rates_mbit, strict=True)))
    return {level: round(network.bandwidth(level), 1) for level in network.levels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mesh", nargs="?", default="2x2", help="nodes x ranks, or racks x nodes x ranks")
    parser.add_argument("--rates", type=float, nargs="+", default=[400.0], help="Mbit/s, one a linked level")
    parser.add_argument("--receive", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--send", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.receive or args.send:
        die_with(args.parent)
        _receive(args.receive) if args.receive else _send(args.send[0], float(args.send[1]))
        return
    with Network(parse_levels(args.mesh)) as network:
        print(json.dumps(measure(network, args.rates)), "Mbit/s of TCP payload;", network.dropped(), "packets dropped")


if __name__ == "__main__":
    main()
