"""One node's part in a job that ``atoll submit`` has started: Ray, or the driver, for as long as the script lives.

    python -P -m launch.node address --name NAME --peer HOST      prints host:port for the head, as this node sees it
    python -P -m launch.node ray --head HOST:PORT --index I …     Ray in the foreground; index 0 is the head
    python -P -m launch.node train --head HOST:PORT --nodes N … -- key=value …   waits for the nodes, then is the driver
    python -P -m launch.node job --nodes N …                      the same in a RayJob; overrides from ATOLL_OVERRIDES

[Note: standard input is the lease] For ``ray`` and ``train`` its first line is the cluster's token, so that no command
line and no file carries it. A second line tells ``train`` to stop as at a SIGTERM: with a checkpoint, in its own time.
The end of the pipe means that the script is gone: ``ray`` kills what it has started, and ``train`` has `LAST_S` left. A
pipe ends however its writer dies, over ssh too, so a killed script leaves nothing running. (A killed srun does not pass
the end on; there Slurm ends the job's processes, and on a node that it has lost Ray does, which misses its head.)

[Note: one SIGTERM] A scheduler sends SIGTERM to every process of a job, and more than once (slurmstepd to the step,
srun passing on what it got, the script by the lease). To the driver a second signal means "end at once", and Ray has to
outlive its last step. So all here block SIGTERM, Ray's processes inherit that, and a thread of ``train`` waits for the
first sign, whichever comes, and hands the driver one.
"""

import _thread
import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from launch import EXIT_RESUMABLE
from launch.address import probe
from launch.submission import OVERRIDES

RAY = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
WRONG = 2
NO_CLUSTER = 3
"""The nodes did not come together: other nodes may. The scripts know it; it does not reach the user."""
PORTS = range(20000, 30000)
"""Where the head's port is looked for: below what Linux hands out by itself (from 32768)."""
LAST_S = 10.0
"""What a driver gets after the lease's end: Ray ends with it, and a driver may wait for a dead cluster for ever."""
LONGEST_FOLDER = 40
"""Ray's sockets lie some 60 characters below its folder, and a socket's path ends at 107."""


def main(argv: list[str]) -> int:
    """Do one of the parts; the exit code."""
    options = _parse(argv)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before any thread: they inherit it
    try:
        if options.part == "address":
            host = address_here(options.peer, options.interface)
            print(f"{host}:{free_port(host, options.name)}")
            return 0
        ended = threading.Event()
        if options.part == "job":
            return _train(options, json.loads(os.environ[OVERRIDES]), ended)
        token = _take_lease(options.part, ended)
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
        return _ray(options, ended) if options.part == "ray" else _train(options, options.overrides, ended)
    except ValueError as error:
        print(f"atoll: {socket.gethostname()}: {error}", file=sys.stderr)
        return NO_CLUSTER


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.node", allow_abbrev=False)
    parser.add_argument("part", choices=("address", "ray", "train", "job"))
    parser.add_argument("--peer", default="", help="another node, for the route to it")
    parser.add_argument("--interface", default="", help="the network interface to use")
    parser.add_argument("--head", default="auto", help="host:port of the cluster")
    parser.add_argument("--index", type=int, default=0, help="this node's place; 0 is the head")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--cpus", type=int, default=0, help="0: those this process may use")
    parser.add_argument("--name", default="", help="the cluster's, unique on this machine")
    parser.add_argument("--wait-s", type=float, default=300.0)
    # argparse would end the list of positional arguments at the first option
    cut = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:cut], argparse.Namespace(overrides=argv[cut + 1 :]))


def address_here(peer: str, interface: str) -> str:
    """This node's address on `interface`; without one, where the route to `peer` leaves; without either, loopback.

    Raises ValueError for an interface or a peer that is not there.
    """
    if interface:
        found = [str(a.address) for a in psutil.net_if_addrs().get(interface, []) if a.family == socket.AF_INET]
        if found:
            return found[0]
        names = ", ".join(psutil.net_if_addrs())
        raise ValueError(f"--interface {interface}: has no IPv4 address here; there are {names}")
    if not peer:
        return "127.0.0.1"
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((peer, 9))  # asks the routing table; UDP sends nothing to connect
            return str(route.getsockname()[0])
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"no route from here to {peer} ({why}); name the network with --interface") from error


def free_port(host: str, name: str) -> int:
    """A port of `host` that nobody listens on; `name` says where to begin, so that jobs seldom meet."""
    first = zlib.crc32(name.encode()) % len(PORTS)
    for port in [*PORTS[first:], *PORTS[:first]]:
        with socket.socket() as listener, suppress(OSError):
            listener.bind((host, port))
            return int(port)
    raise ValueError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free on {host}")


def _take_lease(part: str, ended: threading.Event) -> str:
    """The token; `ended` is set when standard input says more, or ends. See [Note: standard input is the lease]."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise ValueError("standard input ended before the cluster's token came; start this through atoll submit")
        line += byte

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                ended.set()
        ended.set()
        if part == "train":
            time.sleep(LAST_S)
            os._exit(EXIT_RESUMABLE)

    threading.Thread(target=watch, daemon=True).start()
    return line.decode().strip()


def _head_folder(name: str) -> Path:
    """Ray's folder on the head's machine, which the driver has to find."""
    return _temporary() / f"atoll-{name}"


def _make_head_folder(name: str) -> Path:
    """Empty and ours alone; what a killed life of the same name has left is removed."""
    folder = _head_folder(name)
    try:
        if folder.exists() and folder.owner() == psutil.Process().username():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ValueError(f"{folder}, for Ray's sockets and logs: {error.strerror or error}") from error
    return folder


def _temporary() -> Path:
    folder = tempfile.gettempdir()
    return Path(folder if len(folder) <= LONGEST_FOLDER else "/tmp")


def _ray(options: argparse.Namespace, ended: threading.Event) -> int:
    """Run Ray until the lease ends (0) or Ray does (its code, or 1)."""
    from launch.cluster import OBJECT_STORE_BYTES
    from launch.devices import count_cores

    host, _, port = options.head.rpartition(":")
    if options.index == 0:
        folder = _make_head_folder(options.name)
        client = free_port(host, f"{options.name} client")  # nobody's, but Ray opens it, by default always the same one
        where = ["--head", f"--port={port}", "--include-dashboard=false", f"--ray-client-server-port={client}"]
        here = host
    else:
        _wait_for_head(options, ended)
        folder = Path(tempfile.mkdtemp(prefix=f"atoll-{options.name}-", dir=_temporary()))
        where, here = [f"--address={options.head}"], address_here(host, options.interface)
    where += [f"--node-ip-address={here}", f"--temp-dir={folder}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    where += [f"--num-cpus={options.cpus or count_cores()}", f"--num-gpus={options.gpus}"]
    where += ["--dashboard-agent-listen-port=0"]
    ray = psutil.Popen([*RAY, *where], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not ended.wait(0.2) and ray.poll() is None:
        pass
    code = ray.poll()
    _end(ray)
    if code is None:
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    print(f"atoll: {socket.gethostname()}: Ray ended by itself (exit code {code}); its logs: {folder}", file=sys.stderr)
    return code or 1


def _end(ray: psutil.Popen) -> None:
    """Kill it and all that it has started; the workers have nothing left to tidy up."""
    with suppress(psutil.NoSuchProcess):
        family = [*ray.children(recursive=True), ray]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)


def _wait_for_head(options: argparse.Namespace, ended: threading.Event) -> None:
    deadline = time.monotonic() + options.wait_s
    while not ended.wait(0.5):
        try:
            return probe(options.head, max(1.0, min(5.0, deadline - time.monotonic())))
        except ValueError:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"no Ray answered at {options.head} within {options.wait_s:g} s; raise --wait-s, or choose the "
                    f"network that all nodes see with --interface"
                ) from None


class _Told(Exception):
    """Told to stop before there was a driver to tell."""


def _train(options: argparse.Namespace, overrides: list[str], ended: threading.Event) -> int:
    """Wait for the nodes, be the driver, return its exit code. See [Note: one SIGTERM]."""
    threading.Thread(target=_hand_on, args=(ended,), daemon=True).start()
    signal.signal(signal.SIGTERM, _raise_told)
    if options.name:
        os.environ["RAY_TMPDIR"] = str(_head_folder(options.name))  # where Ray looks for this node's address
    try:
        _wait_for_head(options, ended)
        _wait_for_nodes(options, ended)
        signal.signal(signal.SIGTERM, _raise_told)  # Ray has put its own in place
        if ended.is_set():
            return EXIT_RESUMABLE
        from launch.cli import main as atoll

        atoll(["train", *overrides, f"launch.address={options.head}"])
        return 0
    except _Told:
        return EXIT_RESUMABLE
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        # a stop is no failure, however it went
        return EXIT_RESUMABLE if ended.is_set() and code not in (0, WRONG) else code


def _raise_told(number: int, frame: FrameType | None) -> None:
    raise _Told


def _hand_on(ended: threading.Event) -> None:
    """Wait for a SIGTERM or for a word of the lease, and give the main thread one SIGTERM."""
    while not ended.is_set() and signal.sigtimedwait({signal.SIGTERM}, 0.2) is None:
        pass
    ended.set()
    _thread.interrupt_main(signal.SIGTERM)


def _wait_for_nodes(options: argparse.Namespace, ended: threading.Event) -> None:
    """Until as many nodes as the job wants have joined; a head without CPUs is none of them."""
    import ray

    from launch.cluster import QUIET

    ray.init(address=options.head, **QUIET)
    try:
        deadline = time.monotonic() + options.wait_s
        while not ended.is_set():
            alive = sorted(
                node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")
            )
            if len(alive) >= options.nodes:
                return
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{len(alive)} of {options.nodes} nodes joined within {options.wait_s:g} s ({', '.join(alive)}); "
                    f"see the log for the others, or raise --wait-s"
                )
            ended.wait(0.5)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
