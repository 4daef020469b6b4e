import fcntl
import os
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# Threads of OpenMP that wait for each other by spinning on cores that others use take ten times as long. For processes
# that tests start, too; before torch is imported.
os.environ["OMP_WAIT_POLICY"] = "passive"


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before the clock of pytest-timeout starts
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Of the tests that run at a time (pytest-xdist), one that is marked ``timed`` runs alone."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    folder = Path(item.config.option.basetemp).parent  # of all workers
    mode = fcntl.LOCK_EX if item.get_closest_marker("timed") else fcntl.LOCK_SH
    with (folder / "running").open("w") as running:
        with (folder / "next").open("w") as next_:  # who waits goes before those that come later
            fcntl.flock(next_, fcntl.LOCK_EX)
            fcntl.flock(running, mode)
        try:
            return (yield)
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)  # also where a process that was forked meanwhile lives on


@pytest.fixture
def disk_folder() -> Iterator[Path]:
    """A folder on a file system with direct I/O, whatever is under the folder of temporary files."""
    for place in (os.environ.get("TMPDIR", "/tmp"), "/var/tmp", str(Path.cwd())):
        with tempfile.TemporaryDirectory(dir=place, prefix="atoll-test-") as name:
            kind = subprocess.run(["stat", "-f", "-c", "%T", name], capture_output=True, text=True).stdout.strip()
            if kind not in ("tmpfs", "ramfs"):
                yield Path(name)
                return
    pytest.skip("no folder on a drive")


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB, to be filled up."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)
