"""What a folder on a disk is good for: its kind of file system, whether it can be written in, and what it holds."""

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def filesystem_of(folder: Path) -> str:
    """Its name as mount(8) gives it: ext4, xfs, overlay, tmpfs. FileNotFoundError if `folder` is not there."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    inside: list[tuple[int, str]] = []  # some (btrfs) show another number to stat: then the deepest mount above counts
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        point, kind = fields.split()[4].encode().decode("unicode_escape"), rest.split()[0]
        if fields.split()[2] == number:
            return kind
        if folder.resolve().is_relative_to(point):
            inside.append((len(point), kind))
    return max(inside, default=(0, "unknown"))[1]


def try_writing(folder: str | Path) -> None:
    """Make a folder and write a page in it, which is gone again. OSError where that fails."""
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(bytes(4096))


def space_of(folders: Sequence[Path]) -> tuple[int, int]:
    """Bytes free for files of one size, one in each folder, and bytes in all. Folders may be on one disk: its space is
    theirs together."""
    stats = [(os.stat(folder).st_dev, os.statvfs(folder)) for folder in folders]
    sharing = Counter(disk for disk, _ in stats)
    free = min((stat.f_bavail * stat.f_frsize // sharing[disk] for disk, stat in stats), default=0)
    return len(stats) * free, sum({disk: stat.f_blocks * stat.f_frsize for disk, stat in stats}.values())
