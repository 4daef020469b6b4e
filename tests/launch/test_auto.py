"""``parallel=auto`` as a user types it: what its model cannot tell apart is tried, the run keeps the fastest."""

import json
from pathlib import Path

import pytest

from parallel.planning.machine import Link, Machine
from tests.launch.test_workers_on_ray import SMALL

HERE = Machine(
    name="here", compute=2e10, memory_rate=5e9, memory={"host": 4e9}, backend="gloo", unit_s=1e-4, step_s=1e-3,
    links=(Link(name="worker", bandwidth=1e9, latency=2e-4, core=0.5),),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(240)
def test_the_fastest_of_several_is_taken_and_kept(atoll, tmp_path: Path) -> None:
    (tmp_path / "here.json").write_text(json.dumps(HERE.to_mapping()))
    asked = ["train", *SMALL, "launch.workers=2", "parallel=auto", "machine=here.json", "parallel.auto_steps=3"]
    done = atoll(*asked, "train.steps=4")
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "runs" / "tiny-stdlib" / "placement.json").read_text())
    assert len(kept["candidates"]) > 1 and kept["workers"] == 2
    assert (
        f"3 steps of each or more: {kept['candidates'][0]} " in done.stdout
        and f"taken: {kept['chosen']}" in done.stdout
    )
    resumed = atoll(*asked, "train.steps=6", "run.on_change=accept")
    assert resumed.returncode == 0, resumed.stderr
    assert f"parallel.candidates: {kept['chosen']}, as " in resumed.stdout and "resumed from step 4" in resumed.stdout
