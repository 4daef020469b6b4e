"""What this machine has, asked without torch, whose import takes seconds."""

import os
import socket

from launch.checks import Machine


def this_machine() -> Machine:
    return Machine(socket.gethostname(), count_cores(), count_gpus())


def count_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use, by NVML and ``CUDA_VISIBLE_DEVICES``."""
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return 0
    if visible is None:
        return count
    return min(count, len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")]))
