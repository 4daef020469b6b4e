"""The threads that work on host memory: as many as we say, whatever OMP_NUM_THREADS says.

A HostPool owns threads of its own, in C (`native/pool.c`). Calls block until their work is done, release the GIL, and
may come from any number of Python threads at once: their work queues first in, first out, and the next call's work
starts while the last tasks of the one before still run. So a background Python thread that calls is all it takes to
overlap with the GPU. A pool belongs to the process that made it and dies in a fork.

Where the C code cannot be built, `native` is False and the callers (`offload/adamw.py`, `offload/arena.py`,
`checkpoint/crc.py`) do the same from Python: the same results bit for bit, the update about 15 times slower. That is
said once, with the reason.
"""

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from offload.native import NativeError, load_native

log = logging.getLogger(__name__)
SOURCES = tuple(sorted((Path(__file__).parent / "native").glob("*.[ch]")))


class HostPool:
    """A fixed number of threads for `adamw`, `accumulate`, `sum_of_squares`, `copy`, checksums and filling an arena."""

    def __init__(self, threads: int | None = None, *, cpus: Sequence[int] | None = None, niceness: int = 0) -> None:
        """threads: by default one for each core that this process may use. cpus: pin thread i to core ``cpus[i]``.
        niceness: so much nicer than the caller (on Linux, where that is a thread's own).

        Raises ValueError for fewer than one thread, too few `cpus` or a core that is not ours.
        """
        allowed = sorted(os.sched_getaffinity(os.getpid()))
        self.threads = len(cpus or allowed) if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"offload.threads={threads}: at least 1")
        if cpus is not None and (len(cpus) != self.threads or not set(cpus) <= set(allowed)):
            raise ValueError(
                f"offload.cpus={list(cpus)}: {self.threads} threads need as many cores, each one of those that this "
                f"process may use: {allowed}"
            )
        self._library = _library()
        self._gate = threading.Condition()
        self._running = 0
        self._process = os.getpid()
        self._handle: int | None = None
        if self._library is not None:
            numbers = None if cpus is None else (ctypes.c_int * self.threads)(*cpus)
            self._handle = self._library.atoll_pool_open(self.threads, numbers, niceness)
            if not self._handle:
                number = ctypes.get_errno()
                raise OSError(number, f"cannot start {self.threads} threads ({os.strerror(number)}); see ulimit -u")
            self._end = weakref.finalize(self, _end_threads, self._library, self._handle, self._process)
            self._end.atexit = False  # a thread of Python may still be in a call then
        self._closed = False

    @property
    def native(self) -> bool:
        """Whether the C code runs; else torch's operations do, on torch's threads."""
        return self._library is not None

    def call(self, function: str, arguments: ctypes.Structure) -> None:
        """Run the C function ``atoll_<function>(pool, &arguments)`` and wait for it. Needs `native`."""
        if os.getpid() != self._process:
            raise RuntimeError("a HostPool does not survive a fork")
        with self._gate:
            if self._closed:
                raise RuntimeError("this HostPool is closed")
            self._running += 1
        try:
            getattr(self._library, f"atoll_{function}")(self._handle, ctypes.byref(arguments))
        finally:
            with self._gate:
                self._running -= 1
                self._gate.notify_all()

    def close(self) -> None:
        """Wait for the calls under way, then end the threads. A second time does nothing, nor does a fork's child: its
        calls and threads are the parent's."""
        if os.getpid() != self._process:
            return
        with self._gate:
            if self._closed:
                return
            self._closed = True
            self._gate.wait_for(lambda: self._running == 0)
        if self._library is not None:
            self._end()

    def __enter__(self) -> "HostPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_threads(library: Any, handle: int, process: int) -> None:
    """In a fork's child there are no threads to wait for."""
    if os.getpid() == process:
        library.atoll_pool_close(handle)


@cache
def _library() -> Any:
    """The C code, or None and one warning that says why not and what that costs."""
    try:
        library = load_native("host", SOURCES)
    except NativeError as error:
        log.warning(
            "host memory is worked on without C: an update there by torch's operations, about 15 times slower and on "
            "torch's own threads (OMP_NUM_THREADS), checksums of snapshots by threads of Python: %s",
            error,
        )
        return None
    library.atoll_pool_open.restype = ctypes.c_void_p
    library.atoll_pool_open.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int]
    library.atoll_pool_close.restype, library.atoll_pool_close.argtypes = None, [ctypes.c_void_p]
    for name in ("adamw", "accumulate", "squares", "copy", "populate", "checksums"):
        function = getattr(library, f"atoll_{name}")
        function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p]
    return library
