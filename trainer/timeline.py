"""``timeline.jsonl`` of a run's folder: when what began and ended, over all its starts. `atoll report` adds it up.

One object a line with ``time`` (Unix, seconds) and ``event``:

    start   the driver: the process was started
    train   the loop begins, after a start or a recovery; ``step``
    lost    steps were forgotten, to be done again; ``steps``, their ``seconds``, ``active``: when the last was logged
    eval    a validation ended; ``step``, ``seconds``
    save    the loop goes on after a checkpoint began or was waited for; ``step``, ``seconds`` it stood
    end     training ended in order; ``status``, ``step``
    exit    the driver: the command ends

Driver and rank 0 append, each line whole. A timeline that cannot be written costs its lines and nothing else.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from trainer.loggers import read_lines

FILE = "timeline.jsonl"
log = logging.getLogger(__name__)


def note(folder: Path, event: str, *, at: float | None = None, **more: Any) -> None:
    """Append an event of now, or of Unix time `at`."""
    try:
        append_line(folder / FILE, {"time": time.time() if at is None else at, "event": event, **more})
    except OSError as error:
        log.warning("%s cannot be written: %s", folder / FILE, error)


def read(folder: Path) -> list[dict[str, Any]]:
    """All events, oldest first."""
    return sorted(read_lines(folder / FILE), key=lambda line: float(line["time"]))


def append_line(path: Path, tree: dict[str, Any]) -> None:
    """Append one JSON object to a file that several processes append to."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        os.write(file, (json.dumps(tree) + "\n").encode())
    finally:
        os.close(file)
