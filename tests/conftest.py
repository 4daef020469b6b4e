import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


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
