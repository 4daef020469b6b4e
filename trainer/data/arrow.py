"""Documents from Parquet files and Hugging Face datasets, streamed through Arrow batch by batch."""

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from trainer.data.extras import need
from trainer.data.files import checked_utf8, reading, stamps
from trainer.data.passages import Passage, Source

BATCH_ROWS = 256


def read_parquet(path: Path, column: str) -> Iterator[Passage]:
    """The strings of `column`, one document a row, a few rows of one row group in memory at a time."""
    arrow, parquet = need("pyarrow", "data.source=parquet"), need("pyarrow.parquet", "data.source=parquet")
    try:
        with reading(path), parquet.ParquetFile(path) as file:
            _check_column(column, file.schema_arrow.names, path)
            batches = file.iter_batches(BATCH_ROWS, columns=[column])
            yield from _passages((batch.column(0) for batch in batches), column, path)
    except arrow.ArrowException as error:
        raise ValueError(f"data.paths or data.valid_paths: {path} is not a sound Parquet file: {error}") from error


def dataset_source(paths: Sequence[str], column: str, valid: bool) -> Source:
    """Folders written by ``save_to_disk``, or names for ``load_dataset`` (``name:config`` where there are several).

    Of a dataset with splits, ``train`` is read for training and ``validation`` for validation.
    """
    override = "data.valid_paths" if valid else "data.paths"
    split = "validation" if valid else "train"
    datasets = {path: _load(path, split, override) for path in paths}
    for path, dataset in datasets.items():
        _check_column(column, dataset.column_names, path)
    files = [Path(file["filename"]) for dataset in datasets.values() for file in dataset.cache_files]

    def passages() -> Iterator[Passage]:
        return chain.from_iterable(_rows(dataset, column, path) for path, dataset in datasets.items())

    return Source(["datasets", column, list(paths), split, stamps(files)], passages)


def _load(path: str, split: str, override: str) -> Any:
    library = need("datasets", f"{override}={path}")
    folder = os.path.expanduser(path)
    name, _, config = path.partition(":")
    try:
        if os.path.isdir(folder):  # mapped, not read: the files it is mapped from also tell whether it has changed
            found = library.load_from_disk(folder, keep_in_memory=False)
        else:
            found = library.load_dataset(name, config or None, keep_in_memory=False)
    except Exception as error:  # the library raises a dozen kinds of its own
        raise ValueError(
            f"{override}={path}: neither a folder written by save_to_disk nor a dataset that can be loaded: {error}"
        ) from error
    if isinstance(found, library.Dataset):
        return found
    if split not in found:
        raise ValueError(f"{override}={path}: the dataset has no split {split!r}; it has {', '.join(found)}")
    return found[split]


def _rows(dataset: Any, column: str, where: str) -> Iterator[Passage]:
    tables = dataset.select_columns([column]).with_format("arrow").iter(BATCH_ROWS)
    return _passages((table.column(0) for table in tables), column, where)


def _check_column(column: str, columns: Sequence[str], where: Path | str) -> None:
    if column not in columns:
        raise ValueError(f"data.column={column}: {where} has no such column; it has {', '.join(columns)}")


def _passages(batches: Iterator[Any], column: str, where: Path | str) -> Iterator[Passage]:
    """One passage for each value of the Arrow arrays; null is an empty document."""
    arrow = need("pyarrow", "data.source=parquet")
    row = 0
    for values in batches:
        kind = values.type.value_type if arrow.types.is_dictionary(values.type) else values.type
        if kind not in (arrow.string(), arrow.large_string(), arrow.string_view()):
            raise ValueError(f"data.column={column}: in {where} it is of type {kind}, not string")
        # As bytes: Arrow itself does not check that strings are UTF-8, and Python's error would not say where.
        for text in values.cast(arrow.large_string()).cast(arrow.large_binary()).to_pylist():
            yield Passage(checked_utf8(text or b"", f"{where} row {row}"))
            row += 1
