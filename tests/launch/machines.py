"""Machines of a cluster, on this one: each with processes, shared memory, a host name and a network of its own, behind
a switch whose cables can be pulled. They share the file system, as a cluster's machines do.

Of Linux namespaces (`ip netns`, `unshare`); needs root and iproute2. A cable that is pulled is what a machine that
loses its power looks like to the others: nobody hangs up, there is only silence.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

NEEDS = ("ip", "unshare", "nsenter", "mount")
SWITCH, NET = "atoll-sw", "10.77.0"
PORT = 6379
SETUP = """
hostname machine-{number}
mount -t tmpfs -o size=1g tmpfs /dev/shm
mkdir -p /tmp/ray && mount -t tmpfs -o size=1g tmpfs /tmp/ray
exec sleep 3600
"""


def missing() -> str:
    """Why there can be no machines here; empty where there can."""
    lacks = [tool for tool in NEEDS if shutil.which(tool) is None]
    if os.geteuid() != 0 or lacks:
        return f"machines need root and {', '.join(lacks or NEEDS)}"
    probe = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True)
    return "" if probe.returncode == 0 else f"no namespaces here: {probe.stderr.decode().strip()}"


class Machines:
    """`count` machines in a Ray cluster, the first its head; 2 CPUs each."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._inits: list[subprocess.Popen[bytes]] = []
        self.close()  # what a run that was killed has left
        try:
            _ip("link add", SWITCH, "type bridge")
            _ip("addr add", f"{NET}.1/24", "dev", SWITCH)
            _ip("link set", SWITCH, "up")
            for number in range(count):
                self._switch_on(number)
            self._start_ray()
        except BaseException:
            self.close()
            raise

    def address(self, number: int) -> str:
        return f"{NET}.{10 + number}"

    def on(self, number: int, *command: str) -> list[str]:
        """`command` as one to be run on a machine, in the folder where it is started."""
        init = self._inits[number].pid
        child = Path(f"/proc/{init}/task/{init}/children").read_text().split()[0]
        given = [f"{name}={value}" for name, value in self.environment.items()]
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", f"--wd={os.getcwd()}"]
        return ["nsenter", f"--target={child}", *spaces, "env", *given, *command]

    def unplug(self, number: int) -> None:
        _ip("link set", f"atoll-p{number}", "down")

    def close(self) -> None:
        for init in self._inits:
            init.kill()  # and with it all that runs there
            init.wait(20)
        self._inits.clear()
        for name in [line.split()[0] for line in _told("netns list").splitlines() if line.startswith("atoll-m")]:
            for pid in _told("netns pids", name).split():
                with suppress(ProcessLookupError):  # the first has taken the others with it
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns del", name)
            _told("link del", name.replace("-m", "-p"))
        _told("link del", SWITCH)

    def _switch_on(self, number: int) -> None:
        name, port = f"atoll-m{number}", f"atoll-p{number}"
        _ip("netns add", name)
        _ip("link add", port, "type veth peer name eth0 netns", name)
        _ip("link set", port, "master", SWITCH, "up")
        _ip("-n", name, "addr add", f"{self.address(number)}/24 dev eth0")
        _ip("-n", name, "link set eth0 up")
        _ip("-n", name, "link set lo up")
        spaces = ["--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--mount-proc"]
        setup = ["sh", "-c", SETUP.format(number=number)]
        self._inits.append(subprocess.Popen(["ip", "netns", "exec", name, "unshare", *spaces, *setup]))
        deadline = time.monotonic() + 20
        while self._host_name(number) != f"machine-{number}":
            assert time.monotonic() < deadline, "a machine did not start"
            time.sleep(0.05)

    def _host_name(self, number: int) -> str:
        try:
            return subprocess.run(self.on(number, "hostname"), capture_output=True, text=True).stdout.strip()
        except (IndexError, FileNotFoundError):  # it has no process yet
            return ""

    def _start_ray(self) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        for number in range(self.count):
            where = (
                [f"--address={self.address(0)}:{PORT}"]
                if number
                else ["--head", f"--port={PORT}", "--include-dashboard=false"]
            )
            options = [f"--node-ip-address={self.address(number)}", "--num-cpus=2", "--object-store-memory=100000000"]
            command = self.on(number, ray, "start", *where, *options, "--disable-usage-stats")
            started = subprocess.run(command, capture_output=True, text=True, timeout=90)
            assert started.returncode == 0, started.stdout + started.stderr


def _told(*words: str, must: bool = False) -> str:
    command = ["ip", *(part for word in words for part in word.split())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 or not must, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _ip(*words: str) -> None:
    _told(*words, must=True)


def said(command: Sequence[str], timeout_s: float = 60) -> str:
    """What a command prints, which must end well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
