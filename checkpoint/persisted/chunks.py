"""Writing the files of one rank, a few at once: the chunks of its arrays each from where its bytes lie."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from checkpoint.crc import Bytes, crc32c
from checkpoint.errors import CheckpointWriteError
from checkpoint.index import chunk_file
from checkpoint.persisted.folder import Folder
from checkpoint.persisted.layout import CRC_BYTES, Entry

THREADS = 4
"""Chunks in flight: enough for one to be checksummed while others are written and synced."""


class ChunkWriter:
    """Writes chunk files into a rank's folder, `THREADS` at once. Once `cancelled` is set no chunk is begun:
    CheckpointWriteError."""

    def __init__(self, folder: Folder, here: str, cancelled: threading.Event) -> None:
        self._folder, self._here, self._cancelled = folder, here, cancelled
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint")
        self._free = threading.Semaphore(THREADS + 1)
        self._made: set[str] = set()
        self._written: dict[str, Future[Entry]] = {}

    def put(self, array: str, number: int, data: Bytes, size_bytes: int) -> None:
        """Start writing chunk `number` of an array: `data`, padded with zeros to `size_bytes`.

        Waits while too many are being written. `data` must not change until `finish`.
        """
        self._free.acquire()
        if array not in self._made:
            self._folder.make(f"{self._here}/{array}/c")
            self._made.add(array)
        path = f"{self._here}/{chunk_file(array, number)}"
        self._written[path] = self._pool.submit(self._write, path, data, size_bytes)

    def put_file(self, path: str, content: bytes) -> None:
        """Start writing a file that is no chunk."""

        def write() -> Entry:
            self._folder.write(path, content)
            return Entry(len(content), crc32c(content))

        self._written[path] = self._pool.submit(write)

    def finish(self) -> dict[str, Entry]:
        """Wait for all; what was written, by path. Raises what went wrong."""
        return {path: entry.result() for path, entry in self._written.items()}

    def __enter__(self) -> "ChunkWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _write(self, path: str, data: Bytes, size_bytes: int) -> Entry:
        try:
            if self._cancelled.is_set():
                raise CheckpointWriteError("the ranks have ended")
            padding = bytes(size_bytes - len(data))
            crc = crc32c(data, padding)
            # Written as zarr's codecs would, but from where the data lies: zarr's own path copies each chunk twice.
            self._folder.write(path, data.data, padding + crc.to_bytes(CRC_BYTES, "little"))
            return Entry(size_bytes + CRC_BYTES, crc)
        finally:
            self._free.release()
