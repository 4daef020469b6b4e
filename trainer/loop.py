"""The training loop.

`Trainer.train` goes from where the run stands to ``train.steps``; `Trainer.train_step` is one optimizer step. The rest
prepares them and tells what they did. The loop does not know how state is partitioned or where it lives: that is the
engine's affair.

Every rank runs the same steps. Rank 0 alone owns the run's folder and emits events. Whether to stop is decided by all
ranks together: the wish of one travels with the loss, and so does the wish to pause, which ends `train` at a snapshot
so that other ranks can go on from it. On a GPU a step is reported while the next one runs, so that the host never waits
for the device.
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint import CheckpointReader, Checkpoints, rng_state, set_rng_state
from checkpoint.snapshots.no_snapshots import NoSnapshots
from checkpoint.snapshots.rank import Snapshots
from checkpoint.snapshots.reader import SnapshotReader
from checkpoint.snapshots.roster import Roster
from parallel.offloaded import ranks_here
from parallel.options import ParallelOptions
from trainer import fit_activations, too_large, trial
from trainer.build import Rank, build_engine, check_same_data, choose_dtype, compiles, open_snapshots, share_sequences
from trainer.data import open_corpus
from trainer.determinism import deterministic
from trainer.evaluate import sample, validate
from trainer.forecast import settle, wear
from trainer.job import Job
from trainer.memory import Picture
from trainer.meter import Meter
from trainer.models import LanguageModel, build_model
from trainer.models.attention import attention_backends
from trainer.numbers import BadNumbers, Judge, Rewind
from trainer.out_of_memory import explained
from trainer.plan import describe
from trainer.progress import Progress
from trainer.pulse import Pulse
from trainer.resume import check_source, find_source
from trainer.run import LeftBehind, RunFolder
from trainer.running import Running, StepClock, to_host
from trainer.schedule import learning_rate
from trainer.wishes import Wishes

Event = dict[str, Any]
PICTURED = 5
"""Which step of this process the picture of the memory is of."""


class Trainer:
    """Runs a job on this rank: in the process group if there is one, else alone."""

    def __init__(
        self,
        job: Job,
        *,
        emit: Callable[[Event], None] | None = None,
        overrides: Sequence[str] = (),
        roster: Roster | None = None,
        left_behind: LeftBehind | None = None,
    ) -> None:
        """emit: gets each event of rank 0 (docs/architecture.md). None: they are shown on the terminal.
        overrides: what the user typed, kept beside the config. roster: the nodes' snapshot processes. None: one is
        started here where snapshots are wanted and all ranks are on this machine."""
        self._roster, self._left_behind = roster, left_behind or LeftBehind()
        self.job, self.overrides = job, tuple(overrides)
        self.where = Rank.current()
        self._emit = emit or Progress(job.train.steps, every_steps=job.logger.every_steps).show
        self.wishes = Wishes(self.where)
        self.step = -1
        self.pulse = Pulse()
        self._num_passed = 0
        self.snapshots: Snapshots | NoSnapshots = NoSnapshots()

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to end after the step at hand, with a checkpoint. From any thread, or a signal handler."""
        self.wishes.wish_stop(reason)

    def request_pause(self, *, persist: bool = False) -> None:
        """Ask all ranks to end after the step at hand with a snapshot in memory, so that others go on from it at once;
        with a checkpoint where there are none, or to `persist`. From any thread."""
        self.wishes.wish_pause(persist=persist)

    def leave(self) -> None:
        """Wait for nothing that ranks which are gone would have to do. From any thread; `train` then fails soon."""
        self.snapshots.leave()

    def train(self) -> Event:
        """Train to the end or until told to stop. Returns the ``end`` event, ``status`` ``finished``, ``stopped`` or
        ``paused``. BadNumbers, or Rewind, on every rank where ``train.on_bad_numbers`` says so."""
        with (
            deterministic(self.job.train.deterministic),
            self._opened(),
            attention_backends(self.where.device),
            self._out_of_memory_explained(),
        ):
            self.run.note("train", step=self.step)
            wishes, last = self.wishes, self.job.train.steps
            if not wishes.ask(pause=False) and self.where.any(self.where.rank == 0 and self.run.lacks_eval(self.step)):
                self._validate()
            while self.step < last and not (wishes.stopping or wishes.pausing):
                with self._pictured():
                    self._report(self.train_step(self.step))
                self.step += 1
                if self._due(self.job.train.eval_every_steps) or self.step == last:
                    self._validate()
                if self._due(self.job.checkpoint.every_steps):
                    self._save()
                if self.snapshots.due(self.step):
                    self._snapshot()
            done = self.step == last and not self._owes_eval
            return self._pause() if wishes.pausing and not (wishes.stopping or done) else self._conclude()

    def train_step(self, step: int) -> Running:
        """One optimizer step: a forward and a backward of each of this rank's micro-batches, then the update."""
        job, sequence = self.job, self.sequence
        micro, count = job.micro_batches(self.where.world)
        first_sample = self._batches(step) * job.train.global_batch_size + sequence.number * micro * count
        part, seq_len = sequence.part(job.train.seq_len), job.train.seq_len
        weight = sequence.share(seq_len) / (sequence.count * count)
        lr = learning_rate(job.optimizer, step, job.train.steps)
        self.engine.expect(lr)
        loss = torch.zeros((), device=self.where.device)
        for i in range(count):
            self.pulse.beat("data", step)
            tokens, targets = self._batch(first_sample + i * micro, micro, part)
            self.pulse.beat("compute", step)
            with sequence.attention(seq_len):
                loss += self.engine.forward_backward(
                    tokens, targets, part.start, scale=weight, first=i == 0, last=i == count - 1
                )
        self.pulse.beat("update", step)
        self.snapshots.wait_copied()
        told = torch.stack((loss * weight, *(torch.full_like(loss, wish) for wish in self.wishes.here)))
        if self.where.world > 1:
            dist.all_reduce(told)
        fault = ""

        def accept(grad_norm: Tensor) -> bool:
            nonlocal fault
            fault = self._judge.fault(told[0].item(), grad_norm.item())
            return not self.where.any(bool(fault))

        grad_norm = self.engine.step(lr, job.train.clip_norm, accept if self._judge.skips else None)
        values = torch.cat((told, grad_norm.view(1)))
        return Running(step, lr, *to_host(values), fault=fault)

    def _batches(self, step: int) -> int:
        """How many batches of the data lie behind a run that has done so many steps."""
        return step + self._num_passed

    def _batch(self, first_sample: int, count: int, part: slice) -> tuple[Tensor, Tensor]:
        """Tokens and targets, each (count, S of this rank) int64 on the device."""
        rows = self.corpus.train.batch(first_sample, count)
        if self.where.device.type == "cuda":
            rows = rows.pin_memory().to(self.where.device, non_blocking=True)
        return rows[:, :-1][:, part], rows[:, 1:][:, part]

    def _out_of_memory_explained(self) -> AbstractContextManager[None]:
        return explained(self.job, self.where, self.engine, self.corpus.vocab_size, lambda: self.step)

    @contextmanager
    def _pictured(self) -> Iterator[None]:
        """Watches who holds the device's memory in one step, on rank 0: the first few may compile, or choose."""
        self._num_steps += 1
        if self._num_steps != PICTURED or self.where.rank or not self.job.logger.plot:
            yield
            return
        with self._picture.watch(self.step):
            yield
        self.run.save_memory(self._picture.record())

    def _due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.step % every_steps == 0 and self.step < self.job.train.steps

    # ------------------------------------------------------------------------------------------------ start and end

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Open the run and the data, build the model and the engine, and go to where the run stands; at last let go."""
        job, where = self.job, self.where
        with ExitStack() as cleanup:
            self.run = RunFolder(job, self.overrides)
            cleanup.callback(self.run.close)
            if where.rank == 0:
                for note in self.run.prepare(lingers=self._left_behind.lingers, say=self._tell):
                    self._tell(note)
            self.corpus = open_corpus(job.data, job.train.seq_len, job.train.seed, say=self._tell)
            check_same_data(self.corpus, where)
            self._build(cleanup)
            self._resume(cleanup)
            self._clock = StepClock(where.device)
            yield

    def _build(self, cleanup: ExitStack) -> None:
        """Make the model and the engine, and tell what was derived."""
        if self.job.parallel.candidates:
            found = trial.settle(self.job, self.where, self.run.path, self._time_steps, self._tell)
            self.job = replace(self.job, parallel=found)
        model = self._make_engine(cleanup)
        self._event({"type": "plan", "text": describe(self.job, self.where, self.corpus, model, self.engine)})
        device = self.where.device
        self._meter = Meter(self.job, model, self.where)
        cleanup.callback(self._meter.close)
        self._picture = Picture(self.engine, model.units(), device, counted=not compiles(self.job, device))
        self._num_steps = 0
        self.step = 0
        self._saved_step = self._snapshot_step = -1
        self._owes_eval = False
        self._reports: deque[Running] = deque()
        self._lag = 1 if device.type == "cuda" else 0

    def _make_engine(self, cleanup: ExitStack) -> LanguageModel:
        """The engine, as the job says, around a fresh model; the model."""
        job, where = self.job, self.where
        torch.manual_seed(job.train.seed + where.rank)
        dtype, _ = choose_dtype(job.train.dtype, where.device)
        model = build_model(
            job.model,
            vocab_size=self.corpus.vocab_size,
            seq_len=job.train.seq_len,
            dtype=dtype,
            device=where.device,
        )
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.sequence = share_sequences(job, model, where)
        job, counted = fit_activations.settle(job, model, where, dtype, self._tell)
        job, self.forecast = settle(
            job, model, where, dtype, self.run.path, self._tell, sequence=self.sequence, activation_bytes=counted
        )
        self.job = job
        with too_large.explained(job, where, self.corpus.vocab_size, dtype):
            self.engine = build_engine(job, model, where, dtype, self._tell)
        cleanup.callback(self.engine.close)
        self._ranks_here = ranks_here()
        self._judge = Judge(job.train)
        return model

    def _time_steps(self, parallel: ParallelOptions) -> list[float]:
        """Seconds a step of the slowest rank with these options, as `trial.timed`; the model is then thrown away.
        Collective."""
        settled, self.job = self.job, replace(self.job, parallel=parallel)
        with ExitStack() as cleanup:
            self._make_engine(cleanup)
            seconds = trial.timed(self.train_step, settled.parallel.auto_steps, settled.train.steps, self.where)
        self.job = settled
        del self.engine
        gc.collect()
        if self.where.device.type == "cuda":
            torch.cuda.empty_cache()
        return seconds

    def _resume(self, cleanup: ExitStack) -> None:
        """Load what ``run.resume`` names, if there is any, from memory or storage."""
        job, where = self.job, self.where
        writers = dist.new_group(backend="gloo") if where.world > 1 else None
        self.checkpoints = Checkpoints(
            self.run.checkpoint_url, job.checkpoint, where.rank, where.world, writers, self._tell
        )
        cleanup.callback(self.checkpoints.cancel)
        self.snapshots = open_snapshots(job, where, self.run, self._roster, writers, self._tell)
        cleanup.callback(self.snapshots.close)
        source = find_source(self.run, self.checkpoints, self.snapshots, where, self._left_behind.steps_after)
        if source is not None:
            self._load(source)
        if (batch := self._left_behind.batches_before) is not None:
            self._num_passed = batch - self.step
            self._tell(f"step {self.step} is done with batch {batch}: {self._num_passed} are passed over in all")
        self.snapshots.start(self.engine.pieces(), rng_state(), self._meta(), self.engine.movable())
        if source is not None or self._num_passed:
            self._snapshot()  # at once: what was restored may stand on fewer nodes, and lie otherwise for other ranks

    def _load(self, reader: CheckpointReader | SnapshotReader) -> None:
        job, where = self.job, self.where
        check_source(reader, self.run, self.corpus.fingerprint, self._shapes)
        self.engine.load(reader.fill, moments=True)
        self.step = reader.meta["step"]
        self._num_passed = reader.meta.get("passed", 0)
        self.engine.updates = reader.meta.get("updates", self.step)
        self._judge.load(**reader.meta.get("judge", {"losses": [], "in_a_row": 0}))
        stored = isinstance(reader, CheckpointReader)
        if stored:
            self._saved_step = self.step
        if reader.world == where.world:
            set_rng_state(reader.rank_state(where.rank))
        else:
            torch.manual_seed(job.train.seed + where.rank + where.world * self.step)
        if where.rank == 0:
            self.run.truncate(self.step)
        source = self.run.checkpoint_url if stored else "the snapshots in memory"
        text = f"resumed from step {self.step} of {source}, written by {reader.world} ranks"
        self._event({"type": "resumed", "step": self.step, "from": "storage" if stored else "memory", "text": text})

    def _pause(self) -> Event:
        """Leave a snapshot of this step, or a checkpoint, for those who go on."""
        self._flush()
        if self.job.checkpoint.snapshots and self._snapshot_step != self.step:
            self._snapshot()
        self.snapshots.wait()
        missing = self.where.any(self.snapshots.error() is not None)  # a rank may have lost its snapshots alone
        if self.wishes.persisting or not self.job.checkpoint.snapshots or missing:
            self._save()
        self.checkpoints.wait()
        return {"type": "end", "status": "paused", "step": self.step, "text": f"paused after step {self.step}"}

    def _conclude(self) -> Event:
        """Save what is not saved, say how it ended."""
        self._flush()
        job, finished = self.job, self.step == self.job.train.steps and not self._owes_eval
        if self._saved_step != self.step and self.step > 0:
            self._save()
        self.pulse.beat("end", self.step)
        with self._aside("save"):
            self.checkpoints.wait()
        if finished and job.train.sample_tokens:
            text = sample(self.engine, self.corpus, count=job.train.sample_tokens, seq_len=job.train.seq_len, seed=0)
            self._event({"type": "sample", "text": text})
        text = self._ending(finished)
        if error := self.checkpoints.error():
            text += f"\nits last steps are lost: {error}"
        else:
            self.snapshots.close(dropped=True)
        status, unsaved = "finished" if finished else "stopped", error is not None
        end = {"type": "end", "status": status, "step": self.step, "unsaved": unsaved, "text": text}
        self.run.note("end", status=status, step=self.step)
        self._event(end)
        self.run.draw()
        return end

    def _ending(self, finished: bool) -> str:
        """How it ended, after what steps took and what was written to drives where that is known."""
        if finished:
            text = f"finished at step {self.step}: {self.run.path}; for another run set run.name="
        else:
            text = (
                f"stopped after step {self.step} of {self.job.train.steps} ({self.wishes.reason}); the same command "
                f"resumes it"
            )
        compared = self.forecast.summary() if self.forecast else ""
        worn = wear(self.engine.written_bytes_per_s(), self.job.offload, ranks=self._ranks_here)
        return "\n".join(filter(None, (compared, worn, text)))

    # ------------------------------------------------------------------------------------------------ reports

    def _report(self, running: Running) -> None:
        self._reports.append(running)
        if len(self._reports) > self._lag:
            self._log(self._reports.popleft())

    def _flush(self) -> None:
        while self._reports:
            self._log(self._reports.popleft())

    def _log(self, done: Running) -> None:
        """Wait for a step and say what came of it. BadNumbers where they are and are not skipped, on every rank."""
        self.pulse.beat("report", done.step)
        done.wait()
        loss, stops, pauses, grad_norm = done.values.tolist()
        step_s = self._clock.lap(done)
        self.wishes.heard(stops, pauses)
        if not self._judge.skips and (fault := self._judge.fault(loss, grad_norm)):
            self._raise(done.step, fault)
        if self.where.rank:
            return
        metrics = self._meter.read(done, step_s, loss, grad_norm)
        if done.fault:
            self._tell(f"step {done.step} is skipped: {done.fault}")
        self.run.log_step(metrics)
        self._emit({"type": "step", **metrics})
        if self.forecast and (compared := self.forecast.seen(step_s, grad_norm)):
            self._tell(compared)

    def _raise(self, step: int, fault: str) -> NoReturn:
        """BadNumbers, or a Rewind once all versions before this step are there: which is the newest is no matter of
        chance then."""
        if self._judge.rewinds:
            self.pulse.beat("checkpoint", step)
            self.snapshots.wait()
            self.checkpoints.wait()
            raise Rewind(f"step {step} is bad: {fault}", next_batch=self._batches(step) + 1)
        raise BadNumbers(
            f"step {step} is bad: {fault}; lower optimizer.lr={self.job.optimizer.lr}, set train.clip_norm, "
            f"or leave such steps out with train.on_bad_numbers=skip or rewind; checkpoints: "
            f"{self.checkpoints.steps() or 'none'}"
        )

    @contextmanager
    def _aside(self, event: str) -> Iterator[None]:
        """Between two steps: the time inside is noted, and is not the next step's."""
        self._flush()
        began = time.perf_counter()
        yield
        self._clock.restart()
        self.run.note(event, step=self.step, seconds=time.perf_counter() - began)

    def _validate(self) -> None:
        micro, _ = self.job.micro_batches(self.where.world)
        with self._aside("eval"):
            loss = validate(
                self.engine,
                self.corpus,
                self.where,
                self.sequence,
                num_sequences=self.job.train.eval_sequences,
                batch_size=micro,
                go_on=self._go_on_validating,
            )
        if loss is not None and self.where.rank == 0:
            found = {"step": self.step, "valid_loss": loss}
            self.run.log_eval(found)
            self._emit({"type": "eval", **found})

    def _go_on_validating(self) -> bool:
        """Whether no rank was asked to stop or to pause: a validation is given up then, and made good when the run goes
        on."""
        self.pulse.beat("evaluation", self.step)
        self._owes_eval = self.wishes.ask()
        return not self._owes_eval

    def _save(self) -> None:
        """Save the state, while training goes on unless much of it is away from the device: then no copy is made."""
        with self._aside("save"):
            self.pulse.beat("checkpoint", self.step)
            background = self.job.offload.states == "none"
            self.checkpoints.save(self.step, self.engine.pieces(), rng_state(), self._meta(), background=background)
        self._saved_step = self.step

    def _snapshot(self) -> None:
        """The same into the nodes' memory; `wait_copied` comes before the next update. States in host memory stand
        still between two updates as those on the device do, once the one under way has ended: nobody waits for that
        here."""
        if self._judge.rewinds:
            self._flush()  # no version is of a step that was not judged
        self.pulse.beat("snapshot", self.step)
        states = self.job.offload.states
        pieces = self.engine.pieces if states == "host" else self.engine.pieces()
        self._snapshot_step = self.step
        fault = self._reports[-1].unfit if self._reports else str  # a step that was not reported yet may be a bad one
        self.snapshots.save(self.step, pieces, rng_state(), self._meta(), background=states != "nvme", fault=fault)

    def _meta(self) -> dict[str, Any]:
        """What is saved beside the state, once for all ranks."""
        samples = self._batches(self.step) * self.job.train.global_batch_size
        judged = {"updates": self.engine.updates, "judge": self._judge.dump()}
        return {
            "step": self.step,
            "samples": samples,
            "passed": self._num_passed,
            "data": self.corpus.fingerprint,
            **judged,
            **self.run.provenance(),
        }

    def _tell(self, text: str) -> None:
        self._event({"type": "message", "text": text})

    def _event(self, event: Event) -> None:
        if self.where.rank == 0:
            self._emit(event)
