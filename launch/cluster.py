"""The Ray cluster: started or joined, and measured. Every wait has an end.

All errors are ValueErrors that name what was asked and what is there.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray

from launch.address import no_answer
from launch.checks import Crew, Machine
from launch.devices import count_cores
from launch.options import LaunchOptions

log = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 200 << 20
"""Ray's shared memory on this machine: only events pass through it."""
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


@contextmanager
def connected(options: LaunchOptions, crew: Crew | None) -> Iterator[None]:
    """Inside, Ray is connected: to the cluster of ``launch.address``, or without one to our own, started for `crew`."""
    before = psutil.Process().children()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if options.address is None:
            assert crew is not None
            _start(crew)
        else:
            _join(options.address, options.start_timeout_s)
        yield
    finally:
        _stop([process for process in psutil.Process().children() if process not in before])


def _start(crew: Crew) -> None:
    """Our own cluster on this machine."""
    # A SIGTERM for all our processes (Slurm, systemd, timeout) must reach the driver alone, so that the workers can
    # finish their step: Ray's processes inherit this mask, as they do Ray's own for SIGINT. One that comes meanwhile
    # waits, and then meets our handler, not Ray's, which ends the driver. So does Ctrl-C: what a handler raises within
    # Ray's C code is lost, or ends the process by a segmentation fault.
    handler = signal.getsignal(signal.SIGTERM)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        with _on_loopback():
            ray.init(
                address="local",
                num_cpus=max(count_cores(), crew.workers),
                num_gpus=0 if crew.device == "cpu" else None,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                **QUIET,
            )
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A cluster that Ray starts inside listens on loopback alone, as Ray has it for machines that join no other; it
    reads the variable for that (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER) once, when it is imported."""
    from ray._private import ray_constants

    if not hasattr(ray_constants, "ENABLE_RAY_CLUSTER"):
        log.warning(
            "Ray %s cannot be told to listen on loopback alone: its servers take all interfaces", ray.__version__
        )
        yield
        return
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _stop(started: list[psutil.Process]) -> None:
    """Ray gives each of its processes a second to heed a SIGTERM that is masked; most have nothing to tidy up."""
    for process in started:
        with suppress(psutil.NoSuchProcess):
            if process.name() not in ("raylet", "gcs_server"):
                process.kill()
    ray.shutdown()


def _join(address: str, timeout_s: float) -> None:
    """Connect within `timeout_s`, in a thread that can be left behind: Ray itself may wait for minutes, or abort."""
    failure: list[Exception] = []

    def connect() -> None:
        try:
            ray.init(address=address, **QUIET)
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise ValueError(no_answer(address, f"it did not let us join within launch.start_timeout_s={timeout_s:g}"))
    if failure:
        raise ValueError(no_answer(address, str(failure[0]).strip().splitlines()[0])) from failure[0]


def machines() -> list[Machine]:
    """The nodes that are alive."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        Machine(node["NodeManagerAddress"], int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in alive
    ]
