"""What can go wrong with a persisted checkpoint."""

import errno

_REMEDIES = {
    errno.ENOSPC: "free space there, lower checkpoint.keep_last, or set checkpoint.url to a larger disk",
    errno.EDQUOT: "raise the quota, lower checkpoint.keep_last, or set checkpoint.url to another disk",
    errno.EFBIG: "raise the file size limit, or lower checkpoint.chunk_bytes",
    errno.EROFS: "set checkpoint.url to a folder that can be written",
    errno.EACCES: "set checkpoint.url to a folder that can be written",
    errno.EPERM: "set checkpoint.url to a folder that can be written",
}


class CheckpointError(Exception):
    """Base of all errors that reading or writing a checkpoint raises."""


class CheckpointDamaged(CheckpointError):
    """A committed checkpoint is not what was written: a file is missing, short, or has other bytes."""

    def __init__(self, step: int, file: str, problem: str, good_step: int | None) -> None:
        if good_step is None:
            advice = "there is no good one before it"
        else:
            advice = f"the newest good one before it is step {good_step}: run.resume={good_step}"
        super().__init__(f"the checkpoint of step {step} is damaged: {file}: {problem}; {advice}")
        self.step = step
        self.file = file
        self.good_step = good_step
        """Newest step before this one whose file sizes and metadata are right; None: there is none."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint was not written. Training can go on: the ones committed before it are as they were."""


def explain(error: Exception) -> str:
    """One line on a failed write: the file, the cause, and what to do about it."""
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    remedy = _REMEDIES.get(error.errno or 0, "check the storage that checkpoint.url names")
    return f"{error.filename or 'storage'}: {error.strerror or error}; {remedy}"
