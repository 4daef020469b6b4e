"""A job as plain data, and how two of them differ.

Two jobs are the same training when they differ only in `HARMLESS` keys: those say where, how fast and how watched a job
runs, not what is learned (up to the order in which sums are taken).
"""

from dataclasses import asdict
from typing import Any

from trainer.job import Job

ABSENT = "(absent)"
HARMLESS = (
    "engine",
    "parallel",
    "offload",
    "checkpoint",
    "logger",
    "model.name",
    "model.compile",
    "model.loss_chunk_tokens",
    "data.name",
    "data.cache_dir",
    "train.micro_batch_size",
    "train.on_bad_numbers",
    "train.rewinds",
    "train.loss_spike",
    "train.eval_every_steps",
    "train.eval_sequences",
    "train.sample_tokens",
)
"""Keys, or groups of keys, that may change when a run is resumed."""

Change = tuple[str, Any, Any]
"""Key, old value, new value."""


def as_plain(job: Job) -> dict[str, Any]:
    """The resolved options as dicts, lists and scalars. ``model.class`` says which kind of model they describe."""
    plain = asdict(job)
    plain["model"] = {"class": type(job.model).__name__, **plain["model"]}
    return plain


def changes(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Change], list[Change]]:
    """What differs between two plain jobs: the changes of the training, and the harmless ones.

    Options of ``run`` are left out: they say how one start treats the folder.
    """
    before, after = (_flatten({key: value for key, value in job.items() if key != "run"}) for job in (old, new))
    found = [
        (key, before.get(key, ABSENT), after.get(key, ABSENT))
        for key in dict.fromkeys([*before, *after])
        if before.get(key, ABSENT) != after.get(key, ABSENT)
    ]
    return [change for change in found if not _harmless(change[0])], [
        change for change in found if _harmless(change[0])
    ]


def show(found: list[Change]) -> str:
    """One change a line: ``optimizer.lr: 0.0003 -> 0.001``."""
    return "\n".join(f"  {key}: {_scalar(old)} -> {_scalar(new)}" for key, old, new in found)


def _scalar(value: Any) -> str:
    """As the user would type it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _harmless(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in HARMLESS)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
