"""Who may go on in a run's folder, and from where."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import trainer.run as run_module
from checkpoint.options import CheckpointOptions
from checkpoint.persisted.folder import Folder
from parallel.options import OptimizerOptions, ParallelOptions
from trainer.job import Job
from trainer.options import HFOptions, LlamaOptions, LoggerOptions, RunOptions, TrainOptions
from trainer.run import RunFolder, check_free, check_run, check_writable

ROOT = Path(__file__).parents[2]


def make_job(root: Path, **options: object) -> Job:
    run = RunOptions(root=str(root), name="run")
    job = Job(run=run, logger=LoggerOptions(tensorboard=False, plot=False))
    return replace(job, **options)  # type: ignore[arg-type]


def with_run(job: Job, **options: str) -> Job:
    return replace(job, run=replace(job.run, **options))  # type: ignore[arg-type]


def start(job: Job, steps: int = 3) -> list[str]:
    """A process that trained `steps` steps; what it was told at its start."""
    folder = RunFolder(job, ["train.seed=0"])
    notes = folder.prepare()
    for step in range(steps):
        folder.log_step({"step": step, "loss": 1.0})
    folder.close()
    return notes


def hold(job: Job, held: Event) -> None:
    folder = RunFolder(job)
    folder.prepare()
    held.set()
    signal.pause()


def test_it_is_laid_out_and_says_what_was_run(tmp_path: Path) -> None:
    job = make_job(tmp_path, optimizer=OptimizerOptions(lr=1e-3))
    assert start(job) == []
    assert {"config.yaml", "metrics.jsonl", "logs", "tensorboard", "checkpoints"} <= set(os.listdir(tmp_path / "run"))
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert text.startswith("# overrides: train.seed=0\n")
    config = OmegaConf.create(text)
    assert (config.optimizer.lr, config.model["class"], config.train.seq_len) == (1e-3, "LlamaOptions", 256)


def test_making_one_touches_nothing(tmp_path: Path) -> None:
    folder = RunFolder(make_job(tmp_path))
    assert folder.checkpoint_url == str(tmp_path / "run" / "checkpoints")
    assert not list(tmp_path.iterdir())


def test_checkpoints_may_lie_elsewhere(tmp_path: Path) -> None:
    job = make_job(tmp_path, checkpoint=CheckpointOptions(url="memory://elsewhere"))
    start(job)
    assert RunFolder(job).checkpoint_url == "memory://elsewhere"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_same_job_goes_on_without_a_word(tmp_path: Path) -> None:
    start(make_job(tmp_path))
    assert start(make_job(tmp_path)) == []


def test_another_training_is_refused_with_the_difference(tmp_path: Path) -> None:
    start(make_job(tmp_path))
    changed = make_job(tmp_path, optimizer=OptimizerOptions(lr=1e-3), train=TrainOptions(steps=800, clip_norm=None))
    for refuse in (check_run, lambda job: RunFolder(job).prepare()):
        with pytest.raises(ValueError) as caught:
            refuse(changed)
        lines = str(caught.value).splitlines()
        assert lines[1:-1] == [
            "  optimizer.lr: 0.0003 -> 0.001",
            "  train.steps: 400 -> 800",
            "  train.clip_norm: 1.0 -> null",
        ]
        assert "run.name=" in lines[-1] and "run.on_change=accept" in lines[-1]


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    start(make_job(tmp_path))
    with pytest.raises(ValueError, match="model.class: LlamaOptions -> HFOptions"):
        check_run(make_job(tmp_path, model=HFOptions(path="somewhere")))


def test_an_accepted_change_is_the_config_from_then_on(tmp_path: Path) -> None:
    start(make_job(tmp_path))
    changed = make_job(tmp_path, optimizer=OptimizerOptions(lr=1e-3))
    (note,) = start(with_run(changed, on_change="accept"), steps=0)
    assert "optimizer.lr: 0.0003 -> 0.001" in note
    start(make_job(tmp_path))  # what was to be restored was refused, and the run is as it was
    start(with_run(changed, on_change="accept"))
    assert not [note for note in start(changed) if "optimizer.lr" in note]
    assert OmegaConf.load(tmp_path / "run" / "config.1.yaml").optimizer.lr == 3e-4


def test_how_and_where_it_runs_may_change_and_is_noted(tmp_path: Path) -> None:
    start(make_job(tmp_path))
    changed = make_job(
        tmp_path,
        engine="fsdp2",
        parallel=ParallelOptions(placement="hsdp", levels={"node": 2, "gpu": 4}),
        model=LlamaOptions(compile=True, loss_chunk_tokens=512),
        train=TrainOptions(micro_batch_size=2, eval_every_steps=7, sample_tokens=0),
    )
    (note,) = start(changed)
    for line in ("engine: native -> fsdp2", "parallel.levels.node: (absent) -> 2", "model.compile: null -> true"):
        assert line in note
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").engine == "native", "the config of the first start stays"


def test_a_start_that_failed_before_its_first_step_may_be_corrected(tmp_path: Path) -> None:
    start(make_job(tmp_path), steps=0)
    assert start(make_job(tmp_path, optimizer=OptimizerOptions(lr=1e-3))) == []
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").optimizer.lr == 1e-3


def test_resume_never_refuses_a_run_that_exists(tmp_path: Path) -> None:
    job = with_run(make_job(tmp_path), resume="never")
    start(job)
    with pytest.raises(ValueError, match="run.resume=never, but run.name=run exists"):
        check_run(job)


@pytest.mark.parametrize(
    ("resume", "steps", "expected"),
    [("auto", [], None), ("auto", [10, 20], 20), ("true", [10, 20], 20), ("10", [10, 20], 10), ("never", [], None)],
)
def test_the_checkpoint_to_resume_from(tmp_path: Path, resume: str, steps: list[int], expected: int | None) -> None:
    assert RunFolder(with_run(make_job(tmp_path), resume=resume)).resume_step(steps) == expected


@pytest.mark.parametrize(
    ("resume", "steps", "said"),
    [
        ("true", [], "holds no checkpoint"),
        ("15", [20, 10], "run.resume=15: .* holds checkpoints of steps 10, 20"),
        ("15", [], "holds checkpoints of steps none"),
        ("never", [10], "run.resume=never, but .* holds checkpoints of steps 10"),
    ],
)
def test_a_checkpoint_that_is_not_there(tmp_path: Path, resume: str, steps: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunFolder(with_run(make_job(tmp_path), resume=resume)).resume_step(steps)


def test_two_live_runs_in_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOCK_WAIT_S", 0.2)
    job = make_job(tmp_path)
    first = RunFolder(job)
    first.prepare()
    with pytest.raises(ValueError, match=rf"run.name=run .* is being trained by process {os.getpid()} on .*run.name="):
        RunFolder(job).prepare()
    with pytest.raises(ValueError, match=rf"is being trained by process {os.getpid()} on"):
        check_free(job)
    first.close()
    check_free(job)
    RunFolder(job).prepare()


def test_a_killed_process_gives_the_folder_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOCK_WAIT_S", 0.2)
    job, context = make_job(tmp_path), multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold, args=(job, held))
    process.start()
    assert process.pid is not None and held.wait(60)
    with pytest.raises(ValueError, match=f"process {process.pid} on"):
        RunFolder(job).prepare()
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert start(job) == []


def test_a_process_that_lingers_is_waited_for_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOCK_WAIT_S", 0.2)
    job, said = make_job(tmp_path), list[str]()
    first, second = RunFolder(job), RunFolder(job)
    first.prepare()
    ends = threading.Timer(1.0, first.close)
    ends.start()
    second.prepare(lingers=True, say=said.append)
    ends.join()
    assert len(said) == 1 and f"still held by process {os.getpid()} on" in said[0]
    monkeypatch.setattr(run_module, "LINGER_S", 0.5)
    with pytest.raises(ValueError, match="is being trained by"):
        RunFolder(job).prepare(lingers=True)


def test_a_refused_start_does_not_keep_the_folder(tmp_path: Path) -> None:
    start(make_job(tmp_path))
    refused = RunFolder(make_job(tmp_path, optimizer=OptimizerOptions(lr=1e-3)))
    with pytest.raises(ValueError, match="other options"):
        refused.prepare()
    assert start(make_job(tmp_path)) == []


def test_a_file_in_the_place_of_the_root_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run.root=.*/file: .*cannot be written .*run.root="):
        check_writable(make_job(tmp_path / "file"))


def test_a_full_disk_is_refused(small_tmpfs: Path) -> None:
    with open(small_tmpfs / "large", "wb") as file, pytest.raises(OSError, match="No space left"):
        file.write(bytes(8 << 20))
    with pytest.raises(ValueError, match=r"run\.root=.*No space left on device"):
        check_run(make_job(small_tmpfs))
    with pytest.raises(ValueError, match=r"checkpoint\.url=.*No space left on device"):
        Folder.at(str(small_tmpfs / "checkpoints")).check_writable()


def test_a_url_is_not_a_folder() -> None:
    with pytest.raises(ValueError, match="run.root=s3://bucket/runs: must be a folder.*checkpoint.url="):
        check_writable(make_job(Path("."), run=RunOptions(root="s3://bucket/runs")))


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    code = (
        "from trainer.job import Job; from trainer.options import RunOptions; from trainer.run import check_writable\n"
        "import os; os.geteuid() or os.setuid(65534)\n"  # root may write anywhere
        f"check_writable(Job(run=RunOptions(root={str(tmp_path)!r})))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    tmp_path.chmod(0o755)
    assert f"ValueError: run.root={tmp_path}: the folder of run model-stdlib cannot be written there" in found.stderr


def test_the_driver_checks_a_run_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from trainer.job import Job; from trainer.options import RunOptions; from trainer.run import check_run\n"
        f"import trainer.progress, trainer.schedule; check_run(Job(run=RunOptions(root={str(tmp_path)!r})))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
