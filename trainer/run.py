"""A run's folder, ``<run.root>/<run.name>/``: what lies there, and who may go on there.

    config.yaml      the options it was started with, resolved
    metrics.jsonl    one object a step, each step once, whatever was killed in between
    evals.jsonl      one object a validation; its ``step`` is the number of steps done
    timeline.jsonl   when it was started, trained, saved, lost steps and ended (`trainer/timeline.py`)
    loss.png  tensorboard/  logs/
    memory.json  memory.png   who held the device's memory in one step
    profile.json  placement.json   what was measured and chosen, for a resume to choose the same
    failures.jsonl  team.json  chaos.jsonl   `launch`'s: failures, the processes of now, faults made on purpose
    checkpoints/     unless checkpoint.url leads elsewhere
    run.id           tells its snapshots in memory from those of other runs
    run.lock         locked while a process trains here

Rank 0 writes here, between `prepare` and `close`; other ranks only ask for the paths. The lock is the kernel's, so it
goes with its process, however that ends. Nothing here imports torch.
"""

import errno
import fcntl
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from offload.mounts import try_writing
from trainer import timeline
from trainer.changes import Change, as_plain, changes, show
from trainer.job import Job
from trainer.loggers import Background, JsonLines, Record, TensorBoard, keep_steps, read_lines, replace_file

log = logging.getLogger(__name__)

LOCK_WAIT_S = 5.0
"""How long a start waits for the processes of a run that was just killed to be gone."""
LINGER_S = 150.0
"""And for one on a machine that cannot be reached: Ray ends it after 60 s there, NFS gives its lock away after 90."""
PACKAGES = ("atoll", "torch", "numpy", "zarr", "fsspec", "ray", "transformers", "deepspeed")


def run_path(job: Job) -> Path:
    """``<run.root>/<run.name>``; `RunFolder` makes it."""
    return Path(job.run.root).expanduser() / job.run_name


def check_run(job: Job) -> None:
    """What can be known of the run's folder on the driver before anything starts: ValueError as `RunFolder.prepare`."""
    check_writable(job)
    _compare(job)


def check_free(job: Job) -> None:
    """ValueError where another process trains in the run's folder."""
    path = run_path(job) / "run.lock"
    if path.exists():
        check_writable(job)
        _lock(path, job, LOCK_WAIT_S)[0].close()


def check_writable(job: Job) -> None:
    """Make the run's folder and try to write in it. ValueError that names ``run.root`` where that fails."""
    if "://" in job.run.root:
        raise ValueError(
            f"run.root={job.run.root}: must be a folder; checkpoints alone go to a URL, by checkpoint.url="
        )
    try:
        try_writing(run_path(job))
    except OSError as error:
        raise ValueError(
            f"run.root={job.run.root}: the folder of run {job.run_name} cannot be written there "
            f"({error.strerror}: {error.filename or run_path(job)}); choose another folder with run.root="
        ) from error


def _in_use(path: Path) -> bool:
    """Whether there is anything to protect: a start that failed before its first step may be corrected."""
    metrics = path / "metrics.jsonl"
    logged = metrics.exists() and metrics.stat().st_size > 0
    return (path / "config.yaml").exists() and (logged or any((path / "checkpoints").glob("*")))


def _compare(job: Job) -> tuple[list[Change], list[str]]:
    """Accepted changes of the training, and notes for the user. ValueError where `job` may not go on with this run."""
    path = run_path(job)
    if not _in_use(path):
        return [], []
    if job.run.resume == "never":
        raise ValueError(
            f"run.resume=never, but run.name={job.run_name} exists in run.root={job.run.root}; "
            f"choose another run.name=, or run.resume=auto to go on"
        )
    old: Any = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    training, harmless = changes(old, as_plain(job))
    if training and job.run.on_change == "refuse":
        raise ValueError(
            f"run.name={job.run_name} in run.root={job.run.root} was started with other options (then -> now):\n"
            f"{show(training)}\n"
            f"choose another run.name= for a new run, or go on here with the new options by run.on_change=accept"
        )
    notes = [f"accepted by run.on_change=accept:\n{show(training)}"] if training else []
    if harmless:
        notes.append(f"other options than at the first start, for the same training:\n{show(harmless)}")
    return training, notes


def run_id(job: Job) -> bytes:
    """16 bytes that no other run has, the same each time it is started; kept in ``run.id`` of its folder."""
    path = run_path(job) / "run.id"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        fresh = path.with_name(f"run.id.{os.urandom(8).hex()}")
        fresh.write_text(os.urandom(16).hex())
        try:
            os.link(fresh, path)  # whoever comes first: driver and ranks may ask at the same time
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    return bytes.fromhex(path.read_text())


@dataclass(frozen=True, kw_only=True)
class LeftBehind:
    """What this run has turned its back on, and does not take up again."""

    steps_after: int | None = None
    """Checkpoints in storage of later steps than this. None: all may be gone on from."""
    batches_before: int | None = None
    """Batches that led to bad numbers. None: the data goes on where the version that is restored says."""
    lingers: bool = False
    """Whether a process of this run may live on, on a machine that cannot be reached, and hold its folder."""


class RunFolder:
    """The folder of `job`'s run."""

    def __init__(self, job: Job, overrides: Sequence[str] = ()) -> None:
        """Touches nothing. overrides: what the user typed, kept in ``config.yaml`` and in each checkpoint."""
        self.job, self.overrides = job, tuple(overrides)
        self.path = run_path(job)
        self.checkpoint_url = job.checkpoint.url or str(self.path / "checkpoints")
        self._lock: TextIO | None = None
        self._metrics: JsonLines | None = None
        self._config_accepted = False

    def prepare(self, *, lingers: bool = False, say: Callable[[str], None] = lambda _: None) -> list[str]:
        """Take the folder for this process and lay it out. Returns notes for the user.

        lingers: whether who holds it is waited for, up to `LINGER_S`; `say` is told of it.
        Raises ValueError where it cannot be written, where another process trains in it, where its run was started with
        options of another training (unless ``run.on_change=accept``), and where ``run.resume=never`` finds a run.
        """
        check_writable(self.job)
        self._lock, notes = _lock(self.path / "run.lock", self.job, LINGER_S if lingers else LOCK_WAIT_S, say)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        try:
            return notes + self._settle()
        except BaseException:
            self.close()
            raise

    def _settle(self) -> list[str]:
        accepted, notes = _compare(self.job)
        self._config_accepted = bool(accepted)  # and written by `truncate`: what is restored may still be refused
        if not _in_use(self.path):
            self._write_config()
        for name in ("logs", "tensorboard") if self.job.checkpoint.url else ("logs", "tensorboard", "checkpoints"):
            (self.path / name).mkdir(exist_ok=True)
        return notes

    def _set_config_aside(self) -> None:
        """The config that an accepted change replaces stays as ``config.1.yaml``, ``config.2.yaml`` …"""
        number = 1 + len(list(self.path.glob("config.*.yaml")))
        old = (self.path / "config.yaml").read_text(encoding="utf-8")
        replace_file(self.path / f"config.{number}.yaml", old)

    def _write_config(self) -> None:
        header = f"# overrides: {' '.join(self.overrides)}\n" if self.overrides else ""
        replace_file(self.path / "config.yaml", header + OmegaConf.to_yaml(OmegaConf.create(as_plain(self.job))))

    def in_use(self) -> bool:
        """Whether anything was done in it, by this process or one before."""
        return _in_use(self.path)

    def resume_step(self, steps: Sequence[int]) -> int | None:
        """Which of the committed checkpoints to go on from, as ``run.resume`` says; None: from the beginning."""
        asked, there = self.job.run.resume, ", ".join(str(step) for step in sorted(steps)) or "none"
        if asked == "never" and steps:
            raise ValueError(
                f"run.resume=never, but {self.checkpoint_url} holds checkpoints of steps {there}; "
                f"choose another run.name=, or run.resume=auto to go on"
            )
        if asked == "true" and not steps:
            raise ValueError(
                f"run.resume=true, but {self.checkpoint_url} holds no checkpoint; run.resume=auto starts anew"
            )
        if asked.isdigit() and int(asked) not in steps:
            raise ValueError(f"run.resume={asked}: {self.checkpoint_url} holds checkpoints of steps {there}")
        return int(asked) if asked.isdigit() else max(steps, default=None)

    def lacks_eval(self, step: int) -> bool:
        """Whether the validation that belongs to `step` steps done is not in ``evals.jsonl``: at the beginning, or
        where a stop cut it short."""
        every, last = self.job.train.eval_every_steps, self.job.train.steps
        due = step in (0, last) or (every > 0 and step % every == 0)
        return due and (step == 0 or all(r["step"] != step for r in read_lines(self.path / "evals.jsonl")))

    def truncate(self, step: int) -> None:
        """Go on from where `step` steps are done: forget what was logged of later ones, and open the loggers.

        A run that starts from the beginning need not call it: the first thing logged does.
        """
        assert self._lock is not None and self._metrics is None, "prepare() first, truncate() once"
        if self._config_accepted:
            self._set_config_aside()
            self._write_config()
        lost = [record for record in read_lines(self.path / "metrics.jsonl") if record["step"] >= step]
        if lost:
            seconds = sum(record.get("step_s", 0.0) for record in lost)
            self.note("lost", steps=len(lost), seconds=seconds, active=lost[-1].get("time"))
        kept = keep_steps(self.path / "metrics.jsonl", step)
        if kept < step:
            log.warning("%s lacks %d of the %d steps done", self.path / "metrics.jsonl", step - kept, step)
        keep_steps(self.path / "evals.jsonl", step + 1 if step else 0)  # the one at `step` is not repeated on resume
        self._metrics = JsonLines(self.path / "metrics.jsonl")
        self._evals = JsonLines(self.path / "evals.jsonl")
        self._background = Background()
        self._board = TensorBoard(self.path / "tensorboard", step) if self.job.logger.tensorboard else None

    def note(self, event: str, **more: Any) -> None:
        """Add an event to ``timeline.jsonl``; on other ranks than 0 nothing happens."""
        if self._lock is not None:
            timeline.note(self.path, event, **more)

    def log_step(self, record: Record) -> None:
        """A line of ``metrics.jsonl``, in the file when this returns; ``step`` counts from 0."""
        self._log("train", record["step"], record)

    def log_eval(self, record: Record) -> None:
        """A line of ``evals.jsonl``, and a new ``loss.png``; ``step`` is the number of steps done."""
        # TensorBoard counts steps from 0: at the last one done, a resume right after this does not hide it
        self._log("valid", max(record["step"] - 1, 0), record)
        self.draw()

    def _log(self, group: str, step: int, record: Record) -> None:
        if self._metrics is None:
            self.truncate(0)
        assert self._metrics is not None
        (self._metrics if group == "train" else self._evals).append(record)
        if self._board is not None:
            self._background.do("TensorBoard", self._board.write, group, step, record)

    def draw(self) -> None:
        """A new ``loss.png``, drawn in the background."""
        if self.job.logger.plot and self._metrics is not None:
            self._background.do("loss.png", _draw_loss, self.path, self.job.run_name)

    def save_memory(self, record: Record) -> None:
        """``memory.json``, and its picture; `record` as `trainer.memory.Picture.record` gives it."""
        if self._metrics is None:
            self.truncate(0)
        replace_file(self.path / "memory.json", json.dumps(record))
        self._background.do("memory.png", _draw_memory, self.path, self.job.run_name)

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint keeps of where it comes from: the resolved config, the overrides, the versions."""
        return {"config": as_plain(self.job), "overrides": list(self.overrides), "versions": _versions()}

    def close(self) -> None:
        """Wait for all loggers, and give the folder free. May be called twice, or before `prepare`."""
        if self._metrics is not None:
            if self._board is not None:
                self._background.do("TensorBoard", self._board.close)
            self._background.close()
            self._metrics.close()
            self._evals.close()
            self._metrics = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _draw_loss(folder: Path, title: str) -> None:
    from trainer.plot import draw_loss

    draw_loss(folder / "metrics.jsonl", folder / "evals.jsonl", folder / "loss.png", title)


def _draw_memory(folder: Path, title: str) -> None:
    from trainer.memory import draw

    draw(folder / "memory.json", folder / "memory.png", title)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _lock(path: Path, job: Job, wait_s: float, say: Callable[[str], None] = lambda _: None) -> tuple[TextIO, list[str]]:
    """The lock file, locked as long as it is open, and notes. ValueError when another process holds it."""
    file = open(path, "a+", encoding="utf-8")
    began, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file, []
        except BlockingIOError:
            file.seek(0)
            holder, waited_s = file.read().strip() or "another process", time.monotonic() - began
            if waited_s > LOCK_WAIT_S and not said and wait_s > LOCK_WAIT_S:
                say(f"the run's folder is still held by {holder}, which cannot be reached: waiting up to {wait_s:g} s")
                said = True
            if waited_s > wait_s:
                file.close()
                raise ValueError(
                    f"run.name={job.run_name} in run.root={job.run.root} is being trained by {holder}; "
                    f"stop that, or choose another run.name="
                ) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            return file, [
                f"run.root={job.run.root} is on a file system without locks: start no second run in {path.parent}"
            ]
