"""Small C libraries, compiled on the machine that runs them.

Sources are compiled at first use by the machine's C compiler (``$CC``, else ``cc``) for its own processor and kept in
``$XDG_CACHE_HOME/atoll`` (else ``~/.cache/atoll``). A file's name is a hash of all that its content depends on
(sources, flags, compiler, processor), and it gets that name by a rename once it is whole: any number of ranks, and
nodes that share a home, may build at once; the last rename wins and all are the same.

A wheel with the library in it would have to carry one for each processor; 300 lines of C take under two seconds.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FLAGS = ("-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-std=gnu11", "-fPIC", "-shared", "-pthread")
"""No fused and no reordered arithmetic: results do not depend on the processor."""
TIMEOUT_S = 120


class NativeError(RuntimeError):
    """There is no native code on this machine; the message says why."""


def load_native(name: str, sources: Sequence[Path], flags: Sequence[str] = FLAGS) -> ctypes.CDLL:
    """The library made of `sources` (``.c`` files are compiled, all are hashed), built if this machine has none yet.

    Calls into it release the GIL. Raises NativeError without a compiler that works.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    folder, key = cache_folder(), _key(sources, flags, compiler)
    path = folder / f"{name}-{key}.so"
    if path.exists():
        try:
            return ctypes.CDLL(str(path), use_errno=True)
        except OSError:  # cut short by a crash of the machine
            path.unlink(missing_ok=True)
    _build(path, [*compiler, *flags, *(str(s) for s in sources if s.suffix == ".c"), "-lm"])
    return ctypes.CDLL(str(path), use_errno=True)


def cache_folder() -> Path:
    """Where libraries are kept: a folder of this user alone, since what lies in it is executed."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home, "atoll")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise NativeError(f"cannot make {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder of yours") from error
    stat = folder.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        raise NativeError(
            f"{folder} is not this user's alone (owner {stat.st_uid}, mode {stat.st_mode & 0o777:o}) and what lies in "
            f"it is executed; set XDG_CACHE_HOME to a folder of yours, or chmod 700 it"
        )
    return folder


def _build(path: Path, command: list[str]) -> None:
    """Compile to a name of this process alone, then rename."""
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        _run([*command, "-o", draft])
        with open(draft, "rb") as built:
            os.fsync(built.fileno())
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise NativeError(f"no C compiler: {command[0]!r} is not there; install gcc or clang, or set CC") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"the C compiler did not run: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise NativeError(f"the C compiler failed ({shlex.join(command[:1])}, status {done.returncode}): {first}")
    return done.stdout


def _key(sources: Sequence[Path], flags: Sequence[str], compiler: list[str]) -> str:
    """Of everything that the library depends on. ``-march=native`` makes the processor one of these things."""
    digest = hashlib.sha256()
    about = (*flags, *compiler, _run([*compiler, "--version"]), _processor())
    for data in (*(s.read_bytes() for s in sources), *(text.encode() for text in about)):
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Architecture, model and feature flags of the first core."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part", "CPU implementer")
    found = [platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first = cpuinfo.read_text().split("\n\n")[0]
        found += [line for line in first.splitlines() if line.partition(":")[0].strip() in wanted]
    return "\n".join(found)
