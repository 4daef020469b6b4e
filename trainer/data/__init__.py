"""Text as sequences of tokens, in an order that depends on the seed and the global sample index alone.

The names are imported on first use, so that looking for files does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.data.corpus import Corpus, Split, open_corpus

__all__ = ["Corpus", "Split", "open_corpus"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trainer.data' has no attribute {name!r}")
    return getattr(import_module("trainer.data.corpus"), name)
