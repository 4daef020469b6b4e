"""The persisted checkpoints of a run: saved in the background, committed atomically, the last few kept.

`save` copies to host memory and returns; one thread of each rank writes, one checkpoint at a time. Only that thread
uses the process group. A failed save costs that checkpoint alone: it is reported once, training goes on, and the ones
committed before it are untouched.
"""

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.distributed import ProcessGroup

from checkpoint import values
from checkpoint.errors import CheckpointError, CheckpointWriteError, explain
from checkpoint.options import CheckpointOptions
from checkpoint.persisted.folder import Folder
from checkpoint.persisted.reader import CheckpointReader
from checkpoint.persisted.staging import Staging
from checkpoint.persisted.stream import Stream
from checkpoint.persisted.writer import Shard, Source, committed, persist
from checkpoint.ranks import Ranks
from offload.state import Piece

_log = logging.getLogger(__name__)


class Checkpoints:
    """All checkpoints under one path or fsspec URL.

    `group` is a gloo process group of all ranks that nothing else uses, None where `world` is 1; its timeout must
    exceed the time by which the slowest rank writes longer than the fastest. `report` gets, on rank 0 and from any
    thread, each sentence that the user should see. ValueError where the URL cannot hold checkpoints of this job.
    """

    def __init__(
        self,
        url: str,
        options: CheckpointOptions,
        rank: int = 0,
        world: int = 1,
        group: ProcessGroup | None = None,
        report: Callable[[str], None] = _log.warning,
    ) -> None:
        if world > 1 and url.startswith("memory:"):
            raise ValueError(
                f"checkpoint.url={url!r}: memory:// is private to a process, so it can only be used with one worker, "
                f"not {world}; set checkpoint.url to storage that all workers share, or launch.workers=1"
            )
        self.url = url
        self._root = Folder.at(url)
        self._options = options
        self._ranks = Ranks(rank, world, group)
        self._report = report if rank == 0 else lambda text: None
        self._staging = Staging(options.chunk_bytes)
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None
        self._writing: int | None = None
        self._error: CheckpointError | None = None

    def save(
        self,
        step: int,
        pieces: Iterable[Piece],
        rank_state: Mapping[str, Any],
        meta: Mapping[str, Any],
        *,
        background: bool = True,
    ) -> None:
        """Copy this rank's state to host memory and write it in the background; every rank calls it.

        background: without, it is written from where it lies before `save` returns: no copy of all of it is made, and
        a piece need be good only until the next is asked for.

        `rank_state` and `meta` hold None, bool, int, float, str, bytes, tensors, lists and dicts (TypeError
        otherwise); rank 0's `meta` is stored. Waits while the checkpoint before is still being written. Once committed
        it replaces an older one of the same step, and those of later steps: the run has gone back before them.
        """
        state, described = values.dumps(dict(rank_state)), values.dumps(dict(meta))
        if self._thread is not None and self._thread.is_alive():
            self._report(f"the checkpoint of step {step} waits: that of step {self._writing} is still being written")
        self.wait()
        staged = self._staging.stage(pieces) if background else None
        source: Source = staged or Stream(pieces, self._options.chunk_bytes)
        shard = Shard(step=step, source=source, rank_state=state, meta=described)
        self._writing = step
        if staged is None:
            self._persist(shard)
            return
        # A daemon: a rank whose peers are gone must be able to exit, and an unfinished write leaves no marker.
        self._thread = threading.Thread(target=self._persist, args=(shard,), name="checkpoint", daemon=True)
        self._thread.start()
        staged.copy()

    def wait(self) -> None:
        """Return once nothing is being written. Whether that succeeded is in `error`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def error(self) -> CheckpointError | None:
        """Why the last finished save was not committed; None if it was."""
        return self._error

    def close(self) -> None:
        """Wait, and release the host buffers."""
        self.wait()
        self._staging.close()

    def cancel(self) -> None:
        """Give up what is being written, and release the host buffers. Returns once nothing is written any more: the
        next who saves this step does so into the same folder."""
        self._cancelled.set()
        self.close()

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return sorted(committed(self._root))

    def open(self, step: int) -> CheckpointReader:
        """Open a committed checkpoint. CheckpointDamaged where a file is missing or short or metadata is wrong,
        CheckpointError where there is none of that step."""
        folders = committed(self._root)
        if step not in folders:
            found = ", ".join(map(str, sorted(folders))) or "none"
            raise CheckpointError(f"run.resume={step}: no checkpoint of step {step} in {self.url}; there is: {found}")
        alone = self._ranks.world == 1
        return CheckpointReader(folders[step], step, functools.partial(self._good_before, step), alone=alone)

    def _good_before(self, step: int) -> int | None:
        for earlier, folder in sorted(committed(self._root).items(), reverse=True):
            if earlier < step:
                try:
                    return CheckpointReader(folder, earlier).step
                except CheckpointError:
                    continue
        return None

    def _persist(self, shard: Shard) -> None:
        """The body of the writer's thread."""
        try:
            trouble = persist(self._root, self._ranks, shard, self._options.keep_last, self._cancelled)
            self._error = None
            if trouble:
                self._report(f"step {shard.step} is persisted, but {trouble}")
        except Exception as error:  # whatever it is, it must reach the user from this thread and not end the training
            if self._cancelled.is_set():
                return
            problem = str(error) if isinstance(error, CheckpointWriteError) else explain(error)
            self._error = CheckpointWriteError(f"the checkpoint of step {shard.step} was not written: {problem}")
            self._report(f"{self._error}; training goes on, {self._last_good()}")

    def _last_good(self) -> str:
        try:
            steps = self.steps()
        except Exception:
            return "what was committed before is untouched"
        return f"the last good checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
