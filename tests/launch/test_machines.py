"""A job over machines that share nothing but a file system: processes, memory, names and networks of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.machines import Machines, missing, said
from tests.launch.supervised import SNAPSHOTS, atoll_command, running, undisturbed

STEPS = 400

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]


@pytest.fixture
def machines() -> Iterator[Machines]:
    found = Machines(3)
    yield found
    found.close()


def over(machines: Machines, *more: str) -> list[str]:
    job = ["launch.address=auto", f"launch.nodes={machines.count}", f"launch.workers={machines.count}"]
    return [*job, SNAPSHOTS, "checkpoint.parity=1", f"train.steps={STEPS}", *more]


def test_faults_on_machines_that_are_not_ours(machines: Machines, tmp_path: Path) -> None:
    """`atoll chaos` reaches them through Ray; the job goes on from memory each time, bitwise."""
    job = over(machines, "launch.hang_timeout_s=8")
    with undisturbed(3, tmp_path, f"train.steps={STEPS}") as expected:
        whole = expected()
    with running(tmp_path, *job, within=machines.on(0)) as run:
        for number, kill in enumerate(("worker", "hang")):
            run.wait(lambda least=4 + 8 * number: run.steps > least)  # type: ignore[misc]
            ranks = [each["rank"] for each in run.team["ranks"] if each["address"] != machines.address(0)]
            chaos = atoll_command("chaos", f"kill={kill}", f"rank={ranks[0]}", f"run.root={tmp_path}", "run.name=job")
            told = said(machines.on(0, *chaos))
            assert f"rank {ranks[0]} " in told and machines.address(0) not in told, told
            run.wait(lambda count=number: len(run.failures) > count)  # type: ignore[misc]
        assert run.end(200) == 0, run.said
        assert [(f.cause, f.restored_from) for f in run.failures] == [("process", "memory"), ("hang", "memory")]
        assert run.losses == whole
        died = run.said.count("A worker died or was killed")  # Ray's word for a process that ended on its own
        assert died <= 2, run.said


def test_a_machine_without_power(machines: Machines, tmp_path: Path) -> None:
    """That of rank 0, which holds the run's folder, if it is not the driver's. The others go on from their memory, once
    the folder is free."""
    with running(tmp_path, *over(machines), within=machines.on(0)) as run:
        run.wait(lambda: run.steps > 5)
        unplugged = [n for n in range(1, machines.count) if machines.address(n) == run.team["ranks"][0]["address"]] or [
            1
        ]
        machines.unplug(unplugged[0])
        assert run.end(300) == 0, run.said
        [failure] = run.failures
        assert (failure.cause, failure.restored_from, failure.world_after) == ("node", "memory", 2), run.said
        assert failure.steps_lost is not None and failure.steps_lost <= 1
        assert sorted(run.losses) == list(range(STEPS))
