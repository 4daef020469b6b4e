"""Acts on one node of a Ray cluster: here at once, elsewhere by a small task that Ray pins to the node."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil


def on_node(node_id: str, act: Callable[..., Any], *args: Any, timeout_s: float = 30.0) -> Any:
    """What ``act(*args)`` returns on the node, whether Ray runs it there or it is this node.

    `act` is a function of one of our modules. Needs a connection to Ray; raises Ray's errors where the node does not
    answer in time (``GetTimeoutError``) or is not there.
    """
    return ask_node(node_id, act, *args)(timeout_s)


def ask_node(node_id: str, act: Callable[..., Any], *args: Any) -> Callable[[float], Any]:
    """As `on_node`, but it does not wait: what comes back is called with the seconds to wait for the answer. Ray begins
    at once; on this node it is done when it is called."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if ray.get_runtime_context().get_node_id() == node_id:
        return lambda timeout_s: act(*args)
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=pinned)(act)  # type: ignore[call-overload]
    call = task.remote(*args)
    return lambda timeout_s: ray.get(call, timeout=timeout_s)


def process_state(pid: int) -> str:
    """How a process of this machine stands, in words."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "is gone"
    words = {
        psutil.STATUS_STOPPED: "is stopped (SIGSTOP)",
        psutil.STATUS_TRACING_STOP: "is held by a debugger",
        psutil.STATUS_ZOMBIE: "has ended",
        psutil.STATUS_DISK_SLEEP: "waits in the kernel (for a disk or a driver)",
        psutil.STATUS_RUNNING: "computes without letting other threads have their turn",
    }
    return words.get(status, f"does not let other threads have their turn ({status})")


def kill_process(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal to a process of this machine; whether it was there."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False
