import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Threads of OpenMP that wait for each other by spinning on cores that others use take ten times as long. For processes
# that tests start, too; before torch is imported.
os.environ["OMP_WAIT_POLICY"] = "passive"


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
