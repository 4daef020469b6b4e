"""A run whose states are away says beforehand how long a step should take, chooses by it, and compares."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload import mounts
from offload.nvme import NvmeTier
from offload.options import OffloadOptions
from offload.states import AwayStates
from trainer import forecast
from trainer.job import Job
from trainer.loop import Trainer
from trainer.options import DataOptions, LlamaOptions, LoggerOptions, RunOptions, TrainOptions

MODEL = LlamaOptions(dim=64, ffn_dim=128, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=16)
STEPS = 16
AWAY: dict[str, Any] = {"threads": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("".join(f"{number} squared is {number * number}.\n" for number in range(2000)))
    return file


def run(root: Path, data: Path, *, steps: int = STEPS, name: str = "run", **offload: Any) -> tuple[list[float], str]:
    """The losses, and all that was told."""
    job = Job(
        model=MODEL,
        data=DataOptions(source="text", paths=[str(data)], valid_fraction=0, cache_dir=str(root / "cache")),
        train=TrainOptions(
            steps=steps, seq_len=32, global_batch_size=4, micro_batch_size=2, eval_sequences=4, sample_tokens=0
        ),
        offload=OffloadOptions(**AWAY, **offload),
        logger=LoggerOptions(tensorboard=False, plot=False),
        run=RunOptions(root=str(root), name=name, on_change="accept"),
    )
    torch.set_num_threads(1)  # two that wait for each other measure the other processes of this machine
    events: list[dict[str, Any]] = []
    Trainer(job, emit=events.append).train()
    losses = [event["loss"] for event in events if event["type"] == "step"]
    return losses, "\n".join(event["text"] for event in events if "text" in event)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the tiers of runs had written when they were closed."""
    counts: list[int] = []
    close = AwayStates.close

    def counting(self: AwayStates) -> None:
        counts.append(self._on_drives.tier.bytes_written if self._on_drives else 0)
        close(self)

    monkeypatch.setattr(AwayStates, "close", counting)
    return counts


@pytest.mark.timeout(200)
def test_auto_trains_as_what_it_chose_and_says_so(
    tmp_path: Path, data: Path, disk_folder: Path, written: list[int]
) -> None:
    caps = {"device_bytes": 9_000_000, "host_bytes": 4_500_000, "nvme_path": [str(disk_folder)], "nvme_tbw": 600.0}
    losses, told = run(tmp_path, data, states="auto", **caps)
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    chosen = profile["offload"]
    assert chosen["states"] == "nvme" and f"offload.gpu_bytes={chosen['gpu_bytes']}" in told
    assert told.index("predicted: ") < told.index("measured: ") < told.rindex("measured: ")
    assert told.count("drives: writes") == 2 and "rated for 600 TB last" in told
    for act in ("activations", "nvme_tbw", "threads"):
        chosen.pop(act)
    again, unpredicted = run(tmp_path, data, name="explicit", **chosen | {"predict": False})
    assert again == losses, "the prediction changed the training"
    assert unpredicted.count("drives: writes") == 1, "what was written is told in any case"
    _, chose, told_to = written  # the first was the drives' measurement
    assert chose == told_to > 0 and chose % (STEPS + 1) == 0, "12 bytes a parameter at the start and each step"


@pytest.mark.timeout(200)
def test_drives_are_measured_by_no_more_than_may_be_used_of_them(
    tmp_path: Path, data: Path, disk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a run is refused for what it would not need."""
    taken: list[int] = []
    init = NvmeTier.__init__

    def noting(self: NvmeTier, folders: list[Path], size_bytes: int, **more: Any) -> None:
        taken.append(size_bytes)
        init(self, folders, size_bytes, **more)

    monkeypatch.setattr(NvmeTier, "__init__", noting)
    caps = {"device_bytes": 9_000_000, "host_bytes": 6_000_000, "nvme_bytes": 1_000_000}
    run(tmp_path, data, steps=1, states="auto", nvme_path=[str(disk_folder)], **caps)
    assert taken and max(taken) <= 1_000_000, taken


@pytest.mark.timeout(200)
def test_what_weights_on_drives_move_is_what_was_predicted(
    tmp_path: Path, data: Path, disk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte as it is written, and as host memory is taken; what is read, but for the embedding, whose backward
    needs no weights."""
    moved: list[tuple[int, int, int]] = []
    close, announce, predicted = AwayStates.close, forecast.Forecast.announce, []

    def counting(self: AwayStates) -> None:
        if there := self._on_drives:
            taken = there._arena.size_bytes + (self.arena.size_bytes if self.arena else 0)
            moved.append((there.tier.bytes_written, there.tier.bytes_read, taken))
        close(self)

    monkeypatch.setattr(AwayStates, "close", counting)
    monkeypatch.setattr(forecast.Forecast, "announce", lambda self: predicted.append(self.prediction) or announce(self))
    tier = {"states": "nvme", "weights": "nvme", "nvme_path": [str(disk_folder)]}
    whole, _ = run(tmp_path, data, name="host", states="host", predict=False)
    for name, host_bytes in (("all", 0), ("part", 5_000_000)):
        losses, told = run(tmp_path, data, name=name, **tier, host_bytes=host_bytes)
        assert losses == whole and "limited by" in told
        written, read, taken = moved[-1]
        (expected,) = predicted[-1:]
        assert written == expected.nvme_bytes + STEPS * expected.written_bytes
        assert 0.95 * STEPS * expected.read_bytes < read <= (STEPS + 3) * expected.read_bytes
        assert expected.host_bytes <= taken < expected.host_bytes + 3 * 4096
    assert moved[-1][0] < moved[1][0]


@pytest.mark.timeout(200)
def test_a_resumed_run_measures_nothing_and_stays_as_it_was(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = run(tmp_path, data, states="auto", device_bytes=9_000_000, host_bytes=20_000_000)
    monkeypatch.setattr(forecast, "measure", None)
    monkeypatch.setattr(forecast, "probe", None)
    _, second = run(tmp_path, data, steps=STEPS + 4, states="auto", device_bytes=9_000_000, host_bytes=20_000_000)
    assert "resumed from step" in second
    line = next(line for line in first.splitlines() if line.startswith("predicted"))
    assert line in second and "offload.states=host" in second


def test_a_run_of_a_version_that_measured_less_is_resumed(tmp_path: Path, data: Path) -> None:
    run(tmp_path, data, states="host")
    [file] = tmp_path.rglob(forecast.FILE)
    before = json.loads(file.read_text())
    before["key"].pop("rates", None)
    for later in ("weights", "states"):
        before["rates"].pop(later)
    file.write_text(json.dumps(before))
    _, told = run(tmp_path, data, steps=STEPS + 2, states="host")
    assert "resumed from step" in told and set(json.loads(file.read_text())["rates"]) > set(before["rates"])


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_the_measured_step_is_near_the_predicted(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of 3, where no other processes share these cores; benchmarks/offload.py says it of a GPU."""
    if os.getloadavg()[0] > 1 + len(os.sched_getaffinity(0)):
        pytest.skip("other processes compute here")
    ratios: list[float] = []
    summary = forecast.Forecast.summary
    monkeypatch.setattr(forecast.Forecast, "summary", lambda self: ratios.append(self.ratio) or summary(self))
    run(tmp_path, data, states="host")
    assert 1 / 3 < ratios[0] < 3, ratios


def test_what_cannot_be_predicted_is_said_or_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no such block")

    monkeypatch.setattr(forecast, "probe", refuse)
    _, told = run(tmp_path, data, steps=1, states="host")
    assert "the time of a step is not predicted: ValueError: no such block" in told
    with pytest.raises(ValueError, match="offload.states=auto: this machine could not be measured: .*no such block"):
        run(tmp_path, data, steps=1, name="auto", states="auto")


def test_what_all_ranks_of_a_machine_write_wears_its_drives(tmp_path: Path) -> None:
    options = OffloadOptions(states="nvme", nvme_path=[str(tmp_path)], nvme_tbw=365.0)
    assert forecast.wear(1e12 / 86400, options, ranks=1).endswith("drives rated for 365 TB last 1.0 years")
    said = forecast.wear(1e12 / 86400, options, ranks=4)
    assert "of 4 ranks, writes 4.00 TB a day" in said and said.endswith("last 91.2 days")
    assert forecast.wear(0.0, options, ranks=4) == ""


def test_what_drives_hold_is_what_files_of_one_size_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drives named twice are not twice as large, nor has a small one the room of a large one."""
    paths = [tmp_path / name for name in ("a", "b", "c")]
    free = {paths[0]: 100, paths[1]: 100, paths[2]: 10}
    disks = {paths[0]: 1, paths[1]: 1, paths[2]: 2}

    def statvfs(path: Path) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=free[path], f_frsize=4096, f_blocks=2 * free[path])

    monkeypatch.setattr(mounts.os, "statvfs", statvfs)
    monkeypatch.setattr(mounts.os, "stat", lambda path: SimpleNamespace(st_dev=disks[path]))
    expected = {(0,): (100, 200), (0, 0): (100, 200), (0, 1): (100, 200), (0, 2): (20, 220), (0, 1, 2): (30, 220)}
    for taken, blocks in (expected | {(): (0, 0)}).items():
        found = mounts.space_of([paths[number] for number in taken])
        assert found == tuple(4096 * count for count in blocks), taken


def test_of_several_ranks_the_slowest_counts() -> None:
    fast = forecast.Profile(
        probed=forecast.Probed(
            block_forward_s=1, block_backward_s=2, rest_forward_s=1, rest_backward_s=0, block_bytes=None, rest_bytes=5
        ),
        rates=forecast.Rates(update=2, pingpong=2, weights=2, states=2, resident=2, into=2, out=2, drive=None),
        room=forecast.MemoryBudget(device_bytes=8, host_bytes=8, nvme_bytes=0),
    )
    slow = forecast.replace(
        fast,
        rates=forecast.replace(fast.rates, update=1),
        room=forecast.replace(fast.room, host_bytes=7),
        probed=forecast.replace(fast.probed, block_forward_s=3),
    )
    worst = forecast._slowest([fast, slow])
    assert worst.rates.update == 1 and worst.rates.into == 2 and worst.rates.drive is None
    assert worst.room.host_bytes == 7 and worst.probed.block_forward_s == 3 and worst.probed.rest_bytes == 5
