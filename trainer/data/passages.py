"""What a source of documents gives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Passage(NamedTuple):
    """A document or, of a long text file, a part of it."""

    text: bytes
    """Valid UTF-8; empty where a row holds no text."""
    continues: bool = False
    """The same document goes on in the next passage."""


@dataclass(frozen=True)
class Source:
    identity: object
    """JSON that is equal for two sources only if they hold the same documents in the same order."""
    passages: Callable[[], Iterator[Passage]]
    """Reads all of it, anew with each call."""
