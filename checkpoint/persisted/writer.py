"""Writing one checkpoint: each rank its shard, then rank 0 the marker.

Runs in the writer's thread of each rank, in step with the others: rank 0 prepares, all write, rank 0 commits. A failure
of one is a failure of all, and leaves no marker.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Protocol

from checkpoint.errors import CheckpointWriteError, explain
from checkpoint.index import Index
from checkpoint.persisted.chunks import ChunkWriter
from checkpoint.persisted.folder import Folder
from checkpoint.persisted.layout import COMMIT, META, Commit, Entry, shard_folder, step_folder, step_of, zarr_metadata
from checkpoint.ranks import Ranks


class Source(Protocol):
    """State to be written."""

    def write(self, chunks: ChunkWriter) -> Index:
        """Put every chunk; says what lies where."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """All that one rank writes of one step."""

    step: int
    source: Source
    rank_state: bytes
    meta: bytes


def committed(root: Folder) -> dict[int, Folder]:
    """The folder of each step that has a committed version."""
    found = sorted((key, name) for name in root.names() if (key := step_of(name)))
    return {step: root.child(name) for (step, _), name in found if root.child(name).exists(COMMIT)}


def persist(root: Folder, ranks: Ranks, shard: Shard, keep_last: int, cancelled: threading.Event) -> str:
    """Write and commit one checkpoint; collective. Returns what went wrong after the commit, empty if nothing did.

    cancelled: while it is set this rank writes nothing more, and the checkpoint fails. Raises CheckpointWriteError, on
    every rank, where it was not committed.
    """
    folder = root.child(_together(ranks, lambda: _prepare(root, shard.step)))
    report: dict[str, Any] = {"problem": "", "files": {}}
    try:
        report["files"] = _write_shard(folder, ranks.rank, shard, cancelled)
    except Exception as error:
        report["problem"] = explain(error)
    reports = ranks.gather(json.dumps(report).encode())
    return _together(ranks, lambda: _finish(root, folder, shard.step, [json.loads(r) for r in reports], keep_last))


def _together(ranks: Ranks, act: Callable[[], str]) -> str:
    """Rank 0 acts, and every rank returns what that returned; where it fails every rank raises CheckpointWriteError."""
    result, problem = "", ""
    if ranks.rank == 0:
        try:
            result = act()
        except CheckpointWriteError as error:
            problem = str(error)
        except Exception as error:
            problem = explain(error)
    result, problem = json.loads(ranks.tell(json.dumps([result, problem]).encode()))
    if problem:
        raise CheckpointWriteError(problem)
    return str(result)


def _prepare(root: Folder, step: int) -> str:
    """Clear what unfinished saves and deletions left behind, and make a new folder for the step. Returns its name."""
    good = {folder.name for folder in committed(root).values()}
    _clear(root, good)
    versions = [key[1] for name in good if (key := step_of(name)) and key[0] == step]
    name = step_folder(step, max(versions, default=-1) + 1)
    root.make(f"{name}/shards")
    root.sync_folders("")
    return name


def _clear(root: Folder, keep: Container[str]) -> None:
    """Delete all steps but those whose folders are named in `keep`."""
    for name in root.names():
        if step_of(name) and name not in keep:
            folder = root.child(name)
            if folder.exists(COMMIT):
                folder.remove(COMMIT)  # first: without its marker a tree that is half deleted is no checkpoint
            folder.remove_tree()


def _write_shard(folder: Folder, rank: int, shard: Shard, cancelled: threading.Event) -> dict[str, Entry]:
    """Write this rank's files into the step's folder. Returns the manifest of them, by path in that folder."""
    here = shard_folder(rank)
    folder.make(here)
    with ChunkWriter(folder, here, cancelled) as chunks:
        index = shard.source.write(chunks)
        arrays = index.arrays.values()
        files = {f"{here}/{path}": content for path, content in zarr_metadata(arrays).items()}
        files[f"{here}/index.json"] = index.dumps()
        files[f"{here}/rank_state.json"] = shard.rank_state
        if rank == 0:
            group = zarr_metadata([])["zarr.json"]
            files |= {META: shard.meta, "zarr.json": group, "shards/zarr.json": group}
        for path, content in files.items():
            chunks.put_file(path, content)
        entries = chunks.finish()
    folders = [here] + [f"{here}/{array.name}/c" for array in arrays]
    folder.sync_folders(*folders, *(f"{here}/{array.name}" for array in arrays))
    return entries


def _finish(root: Folder, folder: Folder, step: int, reports: list[dict[str, Any]], keep_last: int) -> str:
    """Commit the step if every rank wrote its shard and all of it is there, else remove what there is and raise.

    Returns what went wrong after the commit.
    """
    try:
        _commit(folder, step, reports)
    except Exception:
        with contextlib.suppress(Exception):  # what is left has no marker, and the next save clears it
            folder.remove_tree()
        raise
    try:
        # A later step than this one is from before the run went back; it would be taken for the newest.
        kept = [entry for found, entry in sorted(committed(root).items()) if found <= step][-keep_last:]
        _clear(root, {entry.name for entry in kept})
    except Exception as error:
        return f"older checkpoints were not deleted: {explain(error)}"
    return ""


def _commit(folder: Folder, step: int, reports: list[dict[str, Any]]) -> None:
    problems = [f"rank {rank}: {report['problem']}" for rank, report in enumerate(reports) if report["problem"]]
    if problems:
        raise CheckpointWriteError("; ".join(problems))
    files = {path: Entry(*entry) for report in reports for path, entry in report["files"].items()}
    sizes = folder.sizes()
    for path, entry in files.items():
        if sizes.get(path) != entry.size:
            raise CheckpointWriteError(
                f"{folder.path}/{path}: written with {entry.size} bytes, but rank 0 finds "
                f"{sizes.get(path, 'no such file')}; checkpoint.url must be storage that every worker shares"
            )
    folder.sync_folders("shards", "")
    folder.write_atomic(COMMIT, Commit(step=step, world=len(reports), files=files).dumps())
