"""Training with states away, clipping and accumulation on, is a plain loop with the CPU optimizer: every loss, bitwise;
and what a drive does wrong stops it with the last checkpoint good."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint.options import CheckpointOptions
from offload.adamw import adamw
from offload.drive import DriveError, SystemCalls
from offload.hostpool import HostPool
from offload.options import OffloadOptions
from offload.states import AwayStates
from parallel import OptimizerOptions
from parallel.cut import cut_units
from parallel.layout import Layout
from parallel.optimizer import sum_of_squares
from tests.trainer.conftest import fill
from trainer.data import open_corpus
from trainer.job import Job
from trainer.loop import Trainer
from trainer.models import LanguageModel, build_model
from trainer.options import DataOptions, LlamaOptions, LoggerOptions, RunOptions, TrainOptions
from trainer.schedule import learning_rate

MODEL = LlamaOptions(dim=32, ffn_dim=64, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=16)
CLIP, MICRO, COUNT = 0.5, 2, 3
HOST: dict[str, Any] = {"states": "host", "threads": 1, "predict": False}
TIERS: dict[str, dict[str, Any]] = {
    "host": HOST,
    "streamed": HOST | {"weights": "host"},
    "weights first": HOST | {"update": "weights_first"},
    "streamed, weights first": HOST | {"weights": "host", "update": "weights_first"},
    "speculate": HOST | {"weights": "host", "update": "speculate", "speculate_share": 0.7},
    "nvme": HOST | {"states": "nvme"},
    "half": HOST | {"states": "nvme", "host_bytes": 1_400_000, "update": "speculate", "speculate_share": 1.0},
    "weights": HOST | {"states": "nvme", "weights": "nvme"},
    "half-weights": HOST
    | {"states": "nvme", "weights": "nvme", "host_bytes": 1_700_000, "update": "speculate", "speculate_share": 1.0},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("".join(f"{number} squared is {number * number}.\n" for number in range(2000)))
    return file


def job_of(root: Path, data: Path, steps: int, offload: dict[str, Any], *, name: str = "run", every: int = 0) -> Job:
    return Job(
        model=MODEL,
        data=DataOptions(source="text", paths=[str(data)], valid_fraction=0, cache_dir=str(root / "cache")),
        train=TrainOptions(
            steps=steps, seq_len=32, global_batch_size=MICRO * COUNT, micro_batch_size=MICRO, clip_norm=CLIP,
            eval_every_steps=0, eval_sequences=4, sample_tokens=0,
        ),
        optimizer=OptimizerOptions(lr=3e-3, warmup_steps=2),
        offload=OffloadOptions(**offload),
        checkpoint=CheckpointOptions(every_steps=every),
        logger=LoggerOptions(tensorboard=False, plot=False),
        run=RunOptions(root=str(root), name=name),
    )  # fmt: skip


def losses_of(job: Job, seen: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[int, float]:
    losses: dict[int, float] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["type"] == "step":
            losses[event["step"]] = event["loss"]
        seen(event)

    torch.set_num_threads(1)
    Trainer(job, emit=emit).train()
    return losses


def norm_of(model: LanguageModel) -> Tensor:
    """The global 2-norm of the gradients, in the engine's order of additions: unit by unit, matrices first."""
    squares = []
    for _, _, named in cut_units(model, model.units())[0]:
        layout = Layout(sorted(named, key=lambda item: item[1].ndim < 2), 1)
        flat = torch.zeros(layout.size)
        for entry, view in zip(layout.entries, layout.views(flat), strict=True):
            view.copy_(dict(named)[entry.name].grad)
        squares.append(sum_of_squares(flat))
    return torch.stack(squares).sum().sqrt().float()


def train_plainly(job: Job) -> tuple[dict[int, float], int]:
    """The same job in a loop of plain PyTorch, by `offload.adamw` on one parameter after the other: the losses, and how
    many updates were clipped."""
    torch.set_num_threads(1)
    torch.manual_seed(job.train.seed)
    corpus = open_corpus(job.data, job.train.seq_len, job.train.seed, say=lambda _: None)
    cpu = torch.device("cpu")
    model = build_model(
        job.model, vocab_size=corpus.vocab_size, seq_len=job.train.seq_len, dtype=torch.float32, device=cpu
    )
    fill(model, model.initial(job.train.seed, cpu))
    parameters = list(model.parameters())
    moments = {p: (torch.zeros(p.numel()), torch.zeros(p.numel())) for p in parameters}
    options, losses, num_clipped = job.optimizer, {}, 0
    with HostPool(1) as pool:
        for step in range(job.train.steps):
            total = torch.zeros(())
            for micro in range(COUNT):
                rows = corpus.train.batch(step * MICRO * COUNT + micro * MICRO, MICRO)
                loss: Tensor = model(rows[:, :-1], rows[:, 1:])
                (loss * (1 / COUNT)).backward()
                total += loss.detach()
            losses[step] = (total * (1 / COUNT)).item()
            grads = [p.grad.view(-1) for p in parameters if p.grad is not None]
            norm = norm_of(model)
            scale = float((CLIP / (norm + 1e-6)).clamp(max=1.0))
            num_clipped += scale < 1
            for p, g in zip(parameters, grads, strict=True):
                adamw(
                    p.data.view(-1), *moments[p], g, None, scale=scale,
                    lr=learning_rate(options, step, job.train.steps), beta1=options.beta1, beta2=options.beta2,
                    eps=options.eps, weight_decay=options.weight_decay if p.ndim >= 2 else 0.0, updates=step + 1,
                    pool=pool,
                )  # fmt: skip
                p.grad = None
    return losses, num_clipped


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(400)
def test_every_tier_trains_as_a_plain_loop_with_the_cpu_optimizer(
    tmp_path: Path, data: Path, disk_folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    placed: set[bool] = set()
    allocate = AwayStates.allocate

    def noting(self: AwayStates) -> None:
        placed.update(shard.on_nvme for shard in self.shards)
        allocate(self)

    monkeypatch.setattr(AwayStates, "allocate", noting)
    expected, num_clipped = train_plainly(job_of(tmp_path, data, steps, {}))
    assert steps // 10 < num_clipped and len(expected) == steps
    for name, offload in (
        TIERS.items() if steps > 20 else [(name, TIERS[name]) for name in ("half", "weights", "half-weights")]
    ):
        drives = {"nvme_path": [str(disk_folder)]} if offload["states"] == "nvme" else {}
        placed.clear()
        found = losses_of(job_of(tmp_path, data, steps, offload | drives, name=name))
        assert placed == ({False, True} if "half" in name else {offload["states"] == "nvme"}), name
        assert found == expected, (name, next(step for step in expected if found[step] != expected[step]))


LIMITS = [
    ({"host_bytes": 1000}, r"offload\.host_bytes=1000: this rank needs \d+; raise it, .*gpu_bytes, or .*weights=nvme"),
    ({"host_bytes": 1000, "weights": "nvme"}, r"offload\.host_bytes=1000: .*; raise it, or .*offload\.gpu_bytes$"),
    ({"nvme_bytes": 1000}, r"offload\.nvme_bytes=1000: this rank needs \d+; raise it, .*or .*offload\.host_bytes$"),
    ({"states": "host", "host_bytes": 1000}, r"offload\.host_bytes=1000: .* or use offload\.states=nvme$"),
]


@pytest.mark.parametrize(("limit", "said"), LIMITS)
def test_a_limit_that_cannot_be_kept_is_refused(
    tmp_path: Path, data: Path, disk_folder: Path, limit: dict[str, Any], said: str
) -> None:
    offload = HOST | {"states": "nvme"} | limit
    drives = {"nvme_path": [str(disk_folder)]} if offload["states"] == "nvme" else {}
    with pytest.raises(ValueError, match=said):
        losses_of(job_of(tmp_path, data, 1, offload | drives))


# ------------------------------------------------------------------------------------------------ faults

STEPS, EVERY, FAILS_AT = 9, 3, 5
"""A checkpoint at 3; the drive fails once step 5 is done, before the next."""


class Fault:
    """A system call that fails, always, once it is armed."""

    def __init__(self, call: Callable[..., Any], failure: Callable[..., Any]) -> None:
        self.call, self.failure, self.armed = call, failure, False

    def __call__(self, *arguments: Any) -> Any:
        return (self.failure if self.armed else self.call)(*arguments)


def raising(number: int) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def short(call: Callable[..., int]) -> Callable[..., int]:
    return lambda handle, buffers, offset: call(handle, [buffers[0][:4096]], offset) and 100


FAULTS = [
    pytest.param("pwritev", raising(errno.EIO), "write of .*Input/output error.*resume from the last", id="write-EIO"),
    *(
        pytest.param(act, failure, said, id=name, marks=pytest.mark.slow)
        for name, act, failure, said in [
            ("write-ENOSPC", "pwritev", raising(errno.ENOSPC), "write of .*No space left.*lower offload.nvme_bytes"),
            ("write-EFBIG", "pwritev", raising(errno.EFBIG), "write of .*File too large.*ulimit -f"),
            ("write-ESTALE", "pwritev", raising(errno.ESTALE), "write of .*the drive is gone"),
            ("write-short", "pwritev", short(os.pwritev), "write of .*ended after 100 bytes"),
            ("write-nothing", "pwritev", lambda *_: 0, "write of .*ended after 0 bytes"),
            ("read-EIO", "preadv", raising(errno.EIO), "read of .*Input/output error.*resume from the last"),
            ("read-ENODEV", "preadv", raising(errno.ENODEV), "read of .*the drive is gone"),
            ("read-cut", "preadv", lambda *_: 0, "read of .*ended after 0 bytes"),
        ]
    ),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[int, float]:
    """The losses of a run that nothing disturbs."""
    return losses_of(job_of(tmp_path_factory.mktemp("whole"), data, STEPS, HOST, every=EVERY))


def fail_and_resume(
    root: Path, data: Path, folder: Path, whole: dict[int, float], said: str, break_it: Callable[[], None],
    mend: Callable[[], Path], weights: str = "device",
) -> None:  # fmt: skip
    """A run on a drive that breaks stops with an error that says `said`; the same run on what `mend` returns goes on
    from its last checkpoint, bitwise."""

    before: list[str] = []

    def seen(event: dict[str, Any]) -> None:
        before.append(str(event.get("text", event)))
        if event["type"] == "step" and event["step"] == FAILS_AT - 1:
            break_it()

    on_drive = HOST | {"states": "nvme", "weights": weights, "nvme_path": [str(folder)]}
    with pytest.raises(DriveError, match=said) as raised:
        losses_of(job_of(root, data, STEPS, on_drive, every=EVERY), seen)
    text = str(raised.value)
    assert "at offset" in text and str(folder) in text and "offload.nvme_" in text or "ulimit" in text, text
    told: list[str] = []
    mended = on_drive | {"nvme_path": [str(mend())]}
    rest = losses_of(
        job_of(root, data, STEPS, mended, every=EVERY), lambda event: told.append(str(event.get("text", "")))
    )
    assert f"resumed from step {EVERY} " in " ".join(told), "\n".join([*before, "resumed:", *told])
    assert rest == {step: loss for step, loss in whole.items() if step >= EVERY}


@pytest.mark.parametrize("weights", ["device", "nvme"])
@pytest.mark.parametrize(("act", "failure", "said"), FAULTS)
@pytest.mark.timeout(200)
def test_a_drive_that_fails_stops_the_run_and_leaves_its_checkpoint(
    tmp_path: Path,
    data: Path,
    disk_folder: Path,
    whole: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
    act: str,
    failure: Callable[..., Any],
    said: str,
    weights: str,
) -> None:
    fault = Fault(getattr(os, act), failure)
    monkeypatch.setattr("offload.nvme.SystemCalls", lambda: SystemCalls(**{act: fault}))

    def break_it() -> None:
        fault.armed = True

    def mend() -> Path:
        fault.armed = False
        return disk_folder

    fail_and_resume(tmp_path, data, disk_folder, whole, said, break_it, mend, weights)


@pytest.fixture
def loop_drive(disk_folder: Path) -> Iterator[tuple[Path, Path]]:
    """A mounted ext4 on a loop device, and the file that backs it."""
    image, folder = disk_folder / "image", disk_folder / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    made = subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], capture_output=True)
    if made.returncode or subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True).returncode:
        pytest.skip("may not mount a loop device")
    yield folder, image
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["device", "nvme"])
@pytest.mark.timeout(200)
def test_a_drive_that_dies_under_a_run(
    tmp_path: Path, data: Path, disk_folder: Path, loop_drive: tuple[Path, Path], whole: dict[int, float], weights: str
) -> None:
    folder, image = loop_drive
    said = "(read|write) of .*Input/output error.*resume from the last checkpoint"

    def break_it() -> None:
        looped = subprocess.run(["losetup", "-j", image], capture_output=True, text=True, check=True).stdout
        device = Path(looped.split(":")[0])
        while int((Path("/sys/class/block") / device.name / "size").read_text()) > 128:  # of 512 bytes
            os.truncate(image, 64 * 1024)  # a write under way may make it longer again
            subprocess.run(["losetup", "-c", device], check=True)

    fail_and_resume(tmp_path, data, folder, whole, said, break_it, lambda: disk_folder, weights)
