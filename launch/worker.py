"""A worker's process: it becomes a rank, trains, and lets itself be watched; after a failure of others it becomes a
rank again, of a new process group, and keeps its interpreter, its imports and its CUDA context.

`bootstrap` makes the Ray actor. Ray pickles a class of a local scope by value, so a worker can say that Atoll is
missing or shadowed there before anything of ours is imported; then everything is `Worker`, imported the ordinary way.

Threads: Ray runs `join` and `train` on one thread, `events` on another, and all else on a third beside them. A process
that lets none of them run still writes its stacks into its log at SIGUSR1.
"""

import faulthandler
import os
import queue
import signal
import socket
import threading
import time
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from checkpoint import CheckpointDamaged
from launch.devices import count_cores
from launch.failures import Cause
from launch.fence import Fence
from launch.leave import WayOut, leave
from launch.names import PACKAGES
from trainer.numbers import Rewind
from trainer.pulse import Beat, Look, Pulse
from trainer.run import LeftBehind, run_path

if TYPE_CHECKING:
    from torch.distributed import Store

    from checkpoint.snapshots.roster import Roster
    from trainer.job import Job

Event = dict[str, Any]
ABANDON_S = 0.1
"""Between two tries of getting out: a new connection may have been made meanwhile."""


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
    devices: str | None = None
    """``CUDA_VISIBLE_DEVICES`` of the rank whose place this is. None: what Ray gave."""
    roster: "Roster | None" = None
    """The nodes' snapshot processes; None: the ranks start their own."""
    left_behind: LeftBehind = LeftBehind()


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
    next_batch: int | None = None
    """Of bad numbers that are to be recovered from: the batch that the newest version is to go on with."""
    good_step: int | None = None
    """Of a damaged checkpoint: the step of the newest good one before it, where there is any."""
    user: bool = False
    """What was asked for is wrong, and `cause` alone says so: trying again would not help."""


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
            devices = os.environ.get("CUDA_VISIBLE_DEVICES")
            return {"node": node, "pid": os.getpid(), "fault": fault, "devices": devices}

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

        def pulse(self) -> Any:
            return self.worker.pulse()

        def look(self) -> Any:
            return self.worker.look()

        def request_pause(self, persist: bool) -> None:
            self.worker.request_pause(persist)

        def abandon(self) -> None:
            self.worker.abandon()

    return Bootstrap


class Worker:
    def __init__(self, device: str, threads: int | None, workers_on_node: int) -> None:
        self._threads = take_cores(device, threads, workers_on_node)
        self._way_out = WayOut()
        self._interface = os.environ.get("GLOO_SOCKET_IFNAME")
        import trainer.loop
        from trainer.warm import warm_up

        warm_up(backward=device == "cpu")  # torch, and what it imports at the first step: the long part of the start
        self._device = device
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._trainer: trainer.loop.Trainer | None = None
        self._stop_reason: str | None = None
        self._store: Store | None = None
        self._abandoned = False
        self._free = threading.Event()
        """Set while neither `join` nor `train` runs."""
        self._free.set()

    def listen(self, host: str, collective_timeout_s: float) -> int:
        """On rank 0: serve the store that the ranks meet at, on `host` alone, since it answers anybody. Returns its
        port, chosen by the kernel."""
        from torch.distributed import TCPStore

        timeout = timedelta(seconds=collective_timeout_s)
        # a listener of the store's own would take all interfaces
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port, fd = int(listener.getsockname()[1]), listener.detach()
        self._store = TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=fd)
        return port

    def join(self, assignment: Assignment) -> Failure | None:
        """Join the process group, all ranks at once."""
        self._assignment, self._abandoned = assignment, False
        self._free.clear()
        try:
            leave()  # a group that was joined, and then never trained
            log_to(log_file(run_path(assignment.job) / "logs", assignment.rank))
            if assignment.devices is not None and self._device == "cuda":
                os.environ["CUDA_VISIBLE_DEVICES"] = assignment.devices  # heeded until CUDA is first used
            check_device(self._device)
            join(assignment, self._store, self._interface)
        except Exception as error:
            return self._failed(error)
        self._free.set()
        return None

    def train(self) -> dict[str, Any] | Failure:
        """Train until the end or a failure; what the trainer returns, or why it failed. Then in no process group."""
        import ray
        import torch
        from torch import distributed as dist

        from trainer.loop import Trainer

        torch.set_num_threads(self._threads)  # again, in the thread that trains: OpenMP counts them per thread
        self._free.clear()
        fence = Fence(ray.get_runtime_context().gcs_address) if self._assignment.rank == 0 else None
        try:
            if self._abandoned:
                raise ConnectionError("connection closed: a peer was gone before training began")
            told = self._assignment
            self._trainer = Trainer(
                told.job,
                emit=self._events.put,
                overrides=told.overrides,
                roster=told.roster,
                left_behind=told.left_behind,
            )
            if self._stop_reason:
                self._trainer.request_stop(self._stop_reason)
            result: dict[str, Any] = self._trainer.train()
            dist.barrier()  # rank 0 owns the store: it stays until nobody needs it
            self._leave()
            return result
        except BaseException as error:  # SystemExit too: the driver must learn of every end
            return self._failed(error)
        finally:
            if fence:
                fence.close()

    def _failed(self, error: BaseException) -> Failure:
        """Tidy up after `error`, and tell it."""
        failure = describe(error)
        traceback.print_exc()
        traceback.clear_frames(error.__traceback__)  # they hold the model, and so do the functions that they ran
        error.__traceback__ = None
        try:
            self._leave()
        except Exception:
            traceback.print_exc()
            os._exit(1)  # a process that cannot let go is of no use: another takes its place
        # what fails after the word that a peer is gone is a consequence of it
        return replace(failure, symptom=failure.symptom or self._abandoned)

    def _leave(self) -> None:
        self._trainer = self._store = None
        self._way_out.forget()
        leave()
        self._free.set()

    def abandon(self) -> None:
        """Get `join` or `train` to end soon, by an exception: a peer is gone."""
        self._abandoned = True
        while not self._free.is_set():
            self._wait_no_more()
            self._way_out.break_connections()
            self._way_out.abort_nccl()
            self._free.wait(ABANDON_S)

    def _wait_no_more(self) -> None:
        if (trainer := self._trainer) is not None:
            trainer.leave()

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
        if (trainer := self._trainer) is not None:
            trainer.request_stop(reason)

    def request_pause(self, persist: bool) -> None:
        """End after the step at hand, to go on with other ranks."""
        if (trainer := self._trainer) is not None:
            trainer.request_pause(persist=persist)

    def pulse(self) -> tuple[Beat, float]:
        """What the training thread does, and for how many seconds it has."""
        return trainer.pulse.read() if (trainer := self._trainer) is not None else (Beat(), 0.0)

    def look(self) -> Look:
        """All there is to see of a rank that may hang."""
        return (trainer.pulse if (trainer := self._trainer) is not None else Pulse()).look()


def take_cores(device: str, threads: int | None, workers_on_node: int) -> int:
    """Say how many threads and which devices to compute with, before the libraries that read it are imported."""
    count = threads or max(1, count_cores() // workers_on_node)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)  # Ray has set the first to the CPUs of the actor, which is not what computes
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:  # pages that are put behind each other: what one length leaves free serves any other (docs/memory-plan.md)
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU is not using it: a spare gets its own later
    return count


def log_file(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"


def log_to(path: Path) -> None:
    """Append what this process prints to a file of the run, C++ and crashes included, and its stacks at SIGUSR1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=2)


def check_device(device: str) -> None:
    """ValueError when the driver counted on a GPU that torch cannot use."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"there is a GPU, but torch {torch.__version__} cannot use it: install another, or set launch.device=cpu"
        )


def join(assignment: Assignment, store: "Store | None", interface: str | None) -> None:
    """Join the process group: gloo on CPU, NCCL beside it on a GPU. interface: for gloo, where the user chose it."""
    import torch
    from torch import distributed as dist

    if interface := interface or _interface(assignment.address):
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # else gloo resolves the host's name, which may lead nowhere
    timeout, begin = timedelta(seconds=assignment.collective_timeout_s), time.perf_counter()
    if store is None:
        store = dist.TCPStore(assignment.host, assignment.port, is_master=False, timeout=timeout)
    on_gpu = assignment.device == "cuda"
    if on_gpu:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")  # a dead peer must not end this process too
        torch.cuda.set_device(0)  # each worker sees its own GPU alone
        if assignment.devices is not None and torch.cuda.device_count() != len(assignment.devices.split(",")):
            raise RuntimeError(
                f"CUDA was in use before this process was told its GPU ({assignment.devices}): it sees "
                f"{torch.cuda.device_count()}"
            )
    own_s = time.perf_counter() - begin
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=assignment.rank, world_size=assignment.world, timeout=timeout)
    whole_s = time.perf_counter() - begin
    print(
        f"joined as rank {assignment.rank} of {assignment.world} in {whole_s:.2f} s, {own_s:.2f} s of them for itself"
    )


def _interface(address: str) -> str | None:
    interfaces = psutil.net_if_addrs().items()
    return next((str(name) for name, entries in interfaces if any(entry.address == address for entry in entries)), None)


def describe(error: BaseException) -> Failure:
    user = is_users(error)
    return Failure(
        cause=_sentence(error) if user else f"{type(error).__name__}: {error}".rstrip(": "),
        trace="".join(traceback.format_exception(error)),
        symptom=is_symptom(error),
        kind=kind_of(error),
        next_batch=error.next_batch if isinstance(error, Rewind) else None,
        good_step=error.good_step if isinstance(error, CheckpointDamaged) else None,
        user=user,
    )


def is_users(error: BaseException) -> bool:
    """Whether `error` is a sentence on what was asked for: a ValueError that code of ours has raised, or memory or a
    drive that is not to be had."""
    from offload.arena import ArenaError
    from offload.drive import DriveError

    if isinstance(error, ArenaError | DriveError):
        return True
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, ValueError) and bool(modules) and modules[-1].partition(".")[0] in PACKAGES


def _sentence(error: BaseException) -> str:
    """Without the number and the quotes that an OSError puts around its words."""
    if not isinstance(error, OSError):
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def kind_of(error: BaseException) -> Cause:
    """``device`` for what CUDA or NCCL reports, ``numbers`` for a loss that is none. Memory that is short is an error
    of the job, which leaves CUDA as it was."""
    import torch

    if isinstance(error, FloatingPointError):
        return "numbers"
    if isinstance(error, torch.OutOfMemoryError):
        return "error"
    words = ("cuda", "cublas", "cudnn", "nccl", "nvlink")
    return "device" if isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words) else "error"


def is_symptom(error: BaseException) -> bool:
    """Whether `error` says that a peer is gone, rather than what is wrong."""
    from torch import distributed as dist

    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out waiting")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError | ConnectionError) and any(word in str(error).lower() for word in words)
    )
