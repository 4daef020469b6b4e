"""Text as sequences of tokens, in an order that depends on the seed and the global sample index alone."""

from trainer.data.corpus import Corpus, Split, open_corpus

__all__ = ["Corpus", "Split", "open_corpus"]
