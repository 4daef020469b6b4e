"""What kind of file system a folder is on."""

import os
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
