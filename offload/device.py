"""What a device says of itself: memory, utilisation, power, PCIe, and its peak arithmetic.

NVML is asked by a thread of the reader, once a second: one question about PCIe throughput takes over 20 ms, and a
training step must not wait for it. `DeviceReader.read` returns the last answers. What NVML cannot say (no driver
library, a virtual GPU, a slice of one) is left out of the readings and said once in the log.

NVML sees all GPUs of the machine in its own order; ours is found by its UUID, whatever CUDA_VISIBLE_DEVICES says.
Source: NVML API reference, docs.nvidia.com/deploy/nvml-api.
"""

import logging
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

log = logging.getLogger(__name__)
CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

PEAK_TFLOPS: tuple[tuple[str, float, float, float], ...] = (
    # pattern of the name, then dense TFLOP/s in bf16 (fp32 sums), tf32, fp32; NVIDIA data sheets of each product
    (r"H100 PCIe", 756, 378, 51),
    (r"H(100|200) NVL", 835, 417, 60),
    (r"GH200|H[128]00", 989, 494, 67),
    (r"H20\b", 148, 74, 44),
    (r"A[18]00", 312, 156, 19.5),
    (r"GB200", 2500, 1250, 80),
    (r"B200", 2250, 1125, 75),
    (r"L40S", 362, 183, 91.6),
    (r"L40\b", 181, 90.5, 90.5),
    (r"L4\b", 121, 60, 30.3),
    (r"A40\b", 149.7, 74.8, 37.4),
    (r"A30\b", 165, 82, 10.3),
    (r"A10\b", 125, 62.5, 31.2),
    (r"RTX 4090", 165.2, 82.6, 82.6),
    (r"RTX 3090\b(?! Ti)", 71, 35.6, 35.6),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of `device` in FLOP/s for matrix products in `dtype`; None where it is not known, as for CPUs.

    fp32 means TF32 where `torch.set_float32_matmul_precision` allows it.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    name = torch.cuda.get_device_name(device)
    return peak_flops_by_name(name, dtype, tf32=torch.get_float32_matmul_precision() != "highest")


def peak_flops_by_name(name: str, dtype: torch.dtype, *, tf32: bool) -> float | None:
    """The same for a GPU by the name that its driver gives it, ``NVIDIA H100 80GB HBM3``."""
    for pattern, *tflops in PEAK_TFLOPS:
        if re.search(rf"\b({pattern})", name):
            return tflops[0 if dtype != torch.float32 else 1 if tf32 else 2] * 1e12
    return None


class DeviceReader:
    """Readings of one device, cheap enough for every step."""

    def __init__(self, device: torch.device, interval_s: float = 1.0) -> None:
        """interval_s: how often NVML is asked; CPUs are read at each `read`."""
        self.device = device
        self._process = psutil.Process()
        self._nvml = NvmlSampler(device, interval_s) if device.type == "cuda" else None

    def read(self) -> dict[str, float]:
        """The readings that this device has. Fractions are in 0..1.

        Always: ``memory_bytes`` (what this process holds: reserved by torch on a GPU, resident on a CPU),
        ``host_memory_bytes`` (resident) and ``host_available_bytes`` (left on the machine, or in this container).
        On a GPU also torch's ``peak_allocated_bytes`` and ``peak_reserved_bytes`` since the start (or since the step of
        ``memory.png``), and from NVML, for the whole GPU, ``gpu_memory_bytes gpu_memory_total_bytes gpu_utilization
        power_w pcie_rx_bytes_per_s pcie_tx_bytes_per_s pcie_gen pcie_width``.
        """
        resident = self._process.memory_info().rss
        host = {"host_memory_bytes": resident, "host_available_bytes": host_available_bytes()}
        if self._nvml is None:
            return {"memory_bytes": resident, **host}
        stats = torch.cuda.memory_stats(self.device)
        return {
            "memory_bytes": stats.get("reserved_bytes.all.current", 0),
            "peak_allocated_bytes": stats.get("allocated_bytes.all.peak", 0),
            "peak_reserved_bytes": stats.get("reserved_bytes.all.peak", 0),
            **self._nvml.sample,
            **host,
        }

    def close(self) -> None:
        """Stop asking NVML."""
        if self._nvml is not None:
            self._nvml.close()


def host_available_bytes(root: Path = CGROUP, own: Path = OWN_CGROUP) -> int:
    """Memory still to be had without swapping: the machine's, or less where a control group (v2) that we are in is
    limited: a container's, a Slurm job's, one of systemd's."""
    available = int(psutil.virtual_memory().available)
    entries = own.read_text().splitlines() if own.exists() else []
    path = next((entry.removeprefix("0::/") for entry in entries if entry.startswith("0::/")), "")
    groups = [root / path, *(root / path).parents]
    return max(0, int(min([available, *(_left_bytes(group) for group in groups if group.is_relative_to(root))])))


def _left_bytes(group: Path) -> float:
    limit = group / "memory.max"
    if not limit.exists() or (text := limit.read_text().strip()) == "max":
        return math.inf
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # page cache is given back
    return int(text) - used


class NvmlSampler:
    """A daemon thread that asks NVML about one GPU and leaves the answers in `sample`, which is replaced whole."""

    def __init__(self, device: torch.device, interval_s: float) -> None:
        self.sample: dict[str, float] = {}
        self._device, self._interval_s = device, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = find_handle(pynvml, str(torch.cuda.get_device_properties(self._device).uuid))
        except Exception as error:  # no package, no driver library, no such GPU: readings are not worth a run
            log.warning("no readings from NVML: %s: %s", type(error).__name__, error)
            return
        questions = questions_of(pynvml, handle)
        while True:
            self.sample = self._ask(questions, pynvml.NVMLError)
            if self._stop.wait(self._interval_s):
                pynvml.nvmlShutdown()
                return

    @staticmethod
    def _ask(questions: "dict[str, Callable[[], float]]", refusal: type[Exception]) -> dict[str, float]:
        answers = {}
        for name, question in list(questions.items()):
            try:
                answers[name] = question()
            except refusal as error:
                log.warning("no %s from NVML: %s", name, error)
                del questions[name]
        return answers


def find_handle(nvml: Any, uuid: str) -> Any:
    """NVML's handle of the GPU, or slice of one (MIG), that torch knows by `uuid`."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    except nvml.NVMLError_NotFound:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}".encode())


def questions_of(nvml: Any, handle: Any) -> dict[str, Callable[[], float]]:
    """Each reading and how to get it, in our units (NVML: percent, milliwatts, KB/s)."""

    def pcie(counter: int) -> Callable[[], float]:
        return lambda: nvml.nvmlDeviceGetPcieThroughput(handle, counter) * 1e3

    return {
        "gpu_memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        "gpu_memory_total_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
        "gpu_utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "pcie_rx_bytes_per_s": pcie(nvml.NVML_PCIE_UTIL_RX_BYTES),
        "pcie_tx_bytes_per_s": pcie(nvml.NVML_PCIE_UTIL_TX_BYTES),
        "pcie_gen": lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
        "pcie_width": lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
    }
