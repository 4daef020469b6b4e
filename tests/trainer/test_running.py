import time

import pytest
import torch

from trainer.running import Running, StepClock, to_host


def _running(step: int, device: torch.device) -> Running:
    return Running(step, 0.0, *to_host(torch.zeros(4, device=device)), fault="")


def test_laps_on_the_host_last_from_end_to_end_and_leave_out_what_lay_before_a_restart():
    device = torch.device("cpu")
    began = time.perf_counter()
    clock = StepClock(device)
    time.sleep(0.05)
    first = clock.lap(_running(0, device))
    assert 0.05 <= first <= time.perf_counter() - began
    time.sleep(0.1)
    restarted = time.perf_counter()
    clock.restart()
    time.sleep(0.05)
    assert 0.05 <= clock.lap(_running(1, device)) <= time.perf_counter() - restarted


@pytest.mark.gpu
def test_a_gpu_times_its_steps_itself_however_far_the_host_runs_ahead():
    device, cycles = torch.device("cuda"), 200_000_000
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    clock = StepClock(device)
    issued = []
    for step, times in enumerate((1, 3, 1)):
        torch.cuda._sleep(times * cycles)
        issued.append(_running(step, device))
    began = time.perf_counter()
    seconds = []
    for running in issued:
        running.wait()
        time.sleep(0.01)
        seconds.append(clock.lap(running))
    assert seconds[1] == pytest.approx(3 * seconds[0], rel=0.05)
    assert seconds[2] == pytest.approx(seconds[0], rel=0.05)
    assert sum(seconds) == pytest.approx(time.perf_counter() - began, rel=0.25)
