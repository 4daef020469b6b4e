import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from offload.device import DeviceReader, NvmlSampler, host_available_bytes, peak_flops, peak_flops_by_name

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_a_cpu_reads_the_memory_of_this_process() -> None:
    reader = DeviceReader(CPU)
    before = reader.read()
    with mmap.mmap(-1, 64 << 20) as held:  # pages of its own: malloc may have as much left from tests before
        torch.frombuffer(held, dtype=torch.uint8).fill_(1)
        grown = reader.read()["memory_bytes"] - before["memory_bytes"]
        assert grown == pytest.approx(len(held), rel=0.2)
    assert set(before) == {"memory_bytes", "host_memory_bytes", "host_available_bytes"}
    assert 0 < before["host_available_bytes"] <= psutil.virtual_memory().total


def limited(group: Path, limit_mib: int, used_mib: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit_mib << 20}\n")
    (group / "memory.current").write_text(f"{used_mib + 200 << 20}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {200 << 20}\n")


def test_a_limited_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    limited(tmp_path, 1024, 500)
    assert host_available_bytes(tmp_path, tmp_path / "absent") == 524 << 20


def test_a_job_has_what_the_least_limit_above_it_leaves(tmp_path: Path) -> None:
    """Of a Slurm job, say, whose limit is two groups above its task's, in a machine that limits all of them."""
    limited(tmp_path, 1024, 500)
    limited(tmp_path / "slurm/job_7", 256, 100)
    (tmp_path / "slurm/job_7/step_0/task_0").mkdir(parents=True)
    (own := tmp_path / "own").write_text("4:memory:/other\n0::/slurm/job_7/step_0/task_0\n")
    assert host_available_bytes(tmp_path, own) == 156 << 20
    limited(tmp_path, 1024, 900)
    assert host_available_bytes(tmp_path, own) == 124 << 20


def test_an_unlimited_container_has_what_the_machine_has(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert host_available_bytes(tmp_path) > 0
    assert host_available_bytes(tmp_path / "absent") > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has NVML")
def test_without_nvml_its_readings_are_left_out_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    sampler = NvmlSampler(torch.device("cuda", 0), interval_s=0.01)
    sampler.close()
    assert sampler.sample == {}
    assert caplog.text.count("no readings from NVML") == 1


def test_a_question_that_the_gpu_does_not_answer_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    def unsupported() -> float:
        raise KeyError("Not Supported")

    questions = {"power_w": unsupported, "gpu_utilization": lambda: 0.5}
    for _ in range(2):
        assert NvmlSampler._ask(questions, KeyError) == {"gpu_utilization": 0.5}
    assert caplog.text.count("no power_w from NVML") == 1


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_the_peak_of_a_known_gpu(name: str, tflops: float) -> None:
    assert peak_flops_by_name(name, torch.bfloat16, tf32=False) == tflops * 1e12


def test_fp32_has_two_peaks() -> None:
    found = [peak_flops_by_name("NVIDIA H200", torch.float32, tf32=tf32) for tf32 in (True, False)]
    assert found == [494e12, 67e12]


def test_an_unknown_peak_is_none() -> None:
    assert peak_flops_by_name("NVIDIA A10G", torch.bfloat16, tf32=False) is None
    assert peak_flops(CPU, torch.float32) is None


def test_the_options_are_read_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from offload import OffloadOptions; OffloadOptions()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reads_its_own_memory_power_and_links() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    reader = DeviceReader(device, interval_s=0.05)
    held = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    time.sleep(2)
    started = time.perf_counter()
    found = reader.read()
    read_s = time.perf_counter() - started
    reader.close()
    assert found["memory_bytes"] >= held.nbytes and found["peak_allocated_bytes"] >= held.nbytes
    assert held.nbytes < found["gpu_memory_bytes"] < found["gpu_memory_total_bytes"]
    assert found["gpu_memory_total_bytes"] == pytest.approx(torch.cuda.mem_get_info(device)[1], rel=0.05)
    assert "gpu_utilization" not in found or 0 <= found["gpu_utilization"] <= 1
    assert "power_w" not in found or 10 < found["power_w"] < 2000
    assert read_s < 0.005, "a step must not wait for NVML"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_gpu_is_ours_whatever_is_visible() -> None:
    code = (
        "import time, torch; from offload.device import DeviceReader; torch.ones(3 << 30, device='cuda');"
        "r = DeviceReader(torch.device('cuda', 0), 0.05); time.sleep(2); assert r.read()['gpu_memory_bytes'] > 3 << 30"
    )
    visible = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, env=visible)
