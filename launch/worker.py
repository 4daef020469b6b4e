"""One rank, in its own process: joins the process group, trains, and lets itself be watched.

`bootstrap` makes the Ray actor. Ray pickles a class of a local scope by value, so a worker can say that Atoll is
missing or shadowed there before anything of ours is imported; then everything is `Worker`, imported the ordinary way.

Threads: Ray runs `train` on one thread, and `events` and `request_stop` on threads of their own beside it.
"""

import os
import queue
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from launch.devices import count_cores
from launch.failures import Cause
from trainer.run import run_path

if TYPE_CHECKING:
    from torch.distributed import Store

    from trainer.job import Job

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker is told: the job and its part in it."""

    job: "Job"
    device: str
    overrides: tuple[str, ...]
    rank: int
    world: int
    host: str
    """Address of rank 0's node."""
    port: int
    """Where rank 0's store listens."""
    address: str
    """Address of this rank's node; its interface carries gloo's traffic."""
    collective_timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank ended before its time."""

    cause: str
    """``ValueError: …``, or how the process died."""
    trace: str = ""
    symptom: bool = False
    """A broken or timed out connection: some other rank probably failed first."""
    kind: Cause = "error"
    """What sort of failure it is; the supervisor goes by it."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The rank whose failure is the cause of all."""

    rank: int
    node: str
    failure: Failure


def bootstrap() -> type:
    """The actor class. Its body must not touch a global of this module: that would be imported to unpickle it."""

    class Bootstrap:
        def enter(self, find_fault: Any, version: str, cwd: str) -> dict[str, Any]:
            """Check names and version and go to the driver's folder: ``node``, ``pid``, and ``fault`` or None."""
            import os
            import sys

            import ray

            own = ray.get_runtime_context().get_node_id()
            node = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own)
            fault = find_fault(f" on node {node}")
            if fault is None:
                import launch

                theirs = getattr(launch, "__version__", "unknown")
                if theirs != version:
                    fault = f"node {node} has atoll {theirs}, for {sys.executable}, but the driver has {version}"
                elif os.path.isdir(cwd):
                    os.chdir(cwd)
                else:
                    fault = (
                        f"the driver's folder {cwd} is not on node {node}: start atoll in a folder that every node has"
                    )
            return {"node": node, "pid": os.getpid(), "fault": fault}

        def load(self, device: str, threads: int | None, workers_on_node: int) -> None:
            """Import what training needs, while the other workers do the same."""
            from launch.worker import Worker

            self.worker = Worker(device, threads, workers_on_node)

        def listen(self, host: str, collective_timeout_s: float) -> int:
            port: int = self.worker.listen(host, collective_timeout_s)
            return port

        def join(self, assignment: Any) -> Any:
            return self.worker.join(assignment)

        def train(self) -> Any:
            return self.worker.train()

        def events(self, wait_s: float) -> list[Any]:
            return self.worker.events(wait_s)

        def request_stop(self, reason: str) -> None:
            self.worker.request_stop(reason)

    return Bootstrap


class Worker:
    def __init__(self, device: str, threads: int | None, workers_on_node: int) -> None:
        self._threads = take_cores(device, threads, workers_on_node)
        import trainer.loop  # noqa: F401  # torch, the long part of the start

        check_device(device)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._trainer: Any = None
        self._stop_reason: str | None = None
        self._store: Store | None = None

    def listen(self, host: str, collective_timeout_s: float) -> int:
        """On rank 0: serve the store that the ranks meet at. Returns its port, chosen by the kernel."""
        from torch.distributed import TCPStore

        timeout = timedelta(seconds=collective_timeout_s)
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return int(self._store.port)

    def join(self, assignment: Assignment) -> Failure | None:
        """Join the process group, all ranks at once."""
        self._assignment = assignment
        try:
            log_to(run_path(assignment.job) / "logs" / f"rank-{assignment.rank}.log")
            join(assignment, self._store)
        except Exception as error:
            return describe(error)
        return None

    def train(self) -> dict[str, Any] | Failure:
        """Train to the end; what the trainer returns, or why it failed."""
        import torch

        from trainer.loop import Trainer

        torch.set_num_threads(self._threads)  # again, in the thread that trains: OpenMP counts them per thread
        try:
            told = self._assignment
            self._trainer = Trainer(told.job, emit=self._events.put, overrides=told.overrides)
            if self._stop_reason:
                self._trainer.request_stop(self._stop_reason)
            result: dict[str, Any] = self._trainer.train()
            leave()
            return result
        except BaseException as error:  # SystemExit too: the driver must learn of every end
            return describe(error)

    def events(self, wait_s: float) -> list[Event]:
        """What was emitted since the last call; waits up to `wait_s` for the first."""
        try:
            found = [self._events.get(timeout=wait_s)]
        except queue.Empty:
            return []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    def request_stop(self, reason: str) -> None:
        """End after the step at hand; also before there is a trainer to tell."""
        self._stop_reason = reason
        if self._trainer is not None:
            self._trainer.request_stop(reason)


def take_cores(device: str, threads: int | None, workers_on_node: int) -> int:
    """Say how many threads and which devices to compute with, before the libraries that read it are imported."""
    count = threads or max(1, count_cores() // workers_on_node)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)  # Ray has set the first to the CPUs of the actor, which is not what computes
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return count


def log_to(path: Path) -> None:
    """Append what this process prints to a file of the run, C++ and crashes included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def check_device(device: str) -> None:
    """ValueError when the driver counted on a GPU that torch cannot use."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"there is a GPU, but torch {torch.__version__} cannot use it: install another, or set launch.device=cpu"
        )


def join(assignment: Assignment, store: "Store | None") -> None:
    """Join the process group: gloo on CPU, and NCCL beside it on a GPU."""
    import torch
    from torch import distributed as dist

    interface = _interface(assignment.address)
    if interface:
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", interface
        )  # else gloo resolves the host's name, which may lead nowhere
    timeout = timedelta(seconds=assignment.collective_timeout_s)
    if store is None:
        store = dist.TCPStore(assignment.host, assignment.port, is_master=False, timeout=timeout)
    on_gpu = assignment.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(0)  # Ray shows each worker its own GPU alone
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=assignment.rank, world_size=assignment.world, timeout=timeout)


def _interface(address: str) -> str | None:
    interfaces = psutil.net_if_addrs().items()
    return next((str(name) for name, entries in interfaces if any(entry.address == address for entry in entries)), None)


def leave() -> None:
    from torch import distributed as dist

    dist.barrier()  # rank 0 owns the store: it stays until nobody needs it
    dist.destroy_process_group()


def describe(error: BaseException) -> Failure:
    cause = f"{type(error).__name__}: {error}".rstrip(": ")
    return Failure(cause=cause, trace="".join(traceback.format_exception(error)), symptom=is_symptom(error))


def is_symptom(error: BaseException) -> bool:
    """Whether `error` says that a peer is gone, rather than what is wrong."""
    from torch import distributed as dist

    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out waiting")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError | ConnectionError) and any(word in str(error).lower() for word in words)
    )
