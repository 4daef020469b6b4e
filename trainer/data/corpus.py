"""A corpus as training sees it: two splits of equally long sequences, and the way between text and tokens."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.build import Recipe, Say
from trainer.data.cache import Cache, open_cache
from trainer.data.order import shuffled
from trainer.data.sources import open_source
from trainer.data.tokenizer import Tokenizer, open_tokenizer
from trainer.options import DataOptions

_log = logging.getLogger(__name__)


class Split:
    """Tokens cut into windows of ``seq_len + 1`` with stride ``seq_len``: each token is predicted once an epoch.

    Holds no position: the caller's global sample index is the whole state.
    """

    num_tokens: int
    num_sequences: int

    def __init__(self, tokens: NDArray[Any], seq_len: int, seed: int) -> None:
        """`tokens`: 1-D, of any integer dtype, at least ``seq_len + 1`` of them; read, never copied."""
        self.num_tokens = len(tokens)
        self.num_sequences = (len(tokens) - 1) // seq_len
        assert self.num_sequences > 0
        self._tokens, self._seq_len, self._seed = tokens, seq_len, seed

    def batch(self, first: int, count: int) -> Tensor:
        """The samples ``first`` to ``first + count - 1`` of an endless training run: (count, seq_len + 1) int64.

        A function of the seed and the indices alone. Every ``num_sequences`` samples are an epoch, each in an order of
        its own (see [Note: the order of samples]).
        """
        assert first >= 0 and count >= 0
        return self._windows(shuffled(np.arange(first, first + count), self.num_sequences, self._seed))

    def sequential(self, first: int, count: int) -> Tensor:
        """The sequences as they lie in the corpus, ``first + count <= num_sequences``: (count, seq_len + 1) int64."""
        assert 0 <= first <= first + count <= self.num_sequences
        return self._windows(np.arange(first, first + count))

    def _windows(self, sequences: NDArray[np.int64]) -> Tensor:
        windows = np.empty((len(sequences), self._seq_len + 1), np.int64)
        for window, start in zip(windows, sequences * self._seq_len, strict=True):
            window[:] = self._tokens[start : start + self._seq_len + 1]
        return torch.from_numpy(windows)


class Corpus:
    """What `open_corpus` returns."""

    train: Split
    valid: Split | None
    """None where nothing is held out."""
    vocab_size: int
    """One more than the largest token id."""
    end_of_text: int
    """The token that follows each document."""
    fingerprint: str
    """Equal on two workers only if they hold the same tokens in the same splits."""

    def __init__(self, options: DataOptions, tokenizer: Tokenizer, cache: Cache, seq_len: int, seed: int) -> None:
        self._options, self._tokenizer, self._cache = options, tokenizer, cache
        self.vocab_size, self.end_of_text = tokenizer.vocab_size, tokenizer.end_of_text
        self.fingerprint = cache.meta.fingerprint
        _check_length(options, cache, seq_len)
        self.train = Split(cache.tokens["train"], seq_len, seed)
        self.valid = Split(cache.tokens["valid"], seq_len, seed) if _validates(options) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-text token."""
        tokens: list[int] = self._tokenizer.encode([text.encode()])[0].tolist()
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of any token ids; bytes that are no UTF-8 appear as U+FFFD."""
        return self._tokenizer.decode(tokens)

    def describe(self) -> str:
        """One line: documents, bytes, tokens, and where the cache is."""
        meta = self._cache.meta
        documents, held_out = sum(meta.documents.values()), meta.documents["valid"]
        empty = f" ({meta.empty_documents:,} empty ones left out)" if meta.empty_documents else ""
        return (
            f"{self._options.name}: {documents:,} documents{empty}, {meta.text_bytes / 1e6:,.1f} MB of text, "
            f"{sum(meta.tokens.values()):,} tokens ({self._options.tokenizer}), {held_out:,} documents held out; "
            f"cache {self._cache.folder}"
        )


def open_corpus(options: DataOptions, seq_len: int, seed: int, say: Say = _log.info) -> Corpus:
    """Open the corpus of `options`, tokenizing it first where no cache has it; that is told through `say`.

    Args:
        seq_len: tokens that a sequence predicts (``train.seq_len``); it has one more.
        seed: of the order in which training visits the sequences.

    Raises:
        ValueError: missing, unreadable or malformed data, too little of it, or a cache folder that cannot be written;
            it names the file and the override to change.
    """
    tokenizer = open_tokenizer(options.tokenizer)
    recipe = Recipe(
        source=open_source(options),
        valid_source=open_source(options, valid=True) if options.valid_paths else None,
        valid_fraction=options.valid_fraction,
        tokenizer=tokenizer,
    )
    return Corpus(options, tokenizer, open_cache(recipe, _cache_root(options), options.source, say), seq_len, seed)


def _cache_root(options: DataOptions) -> Path:
    if options.cache_dir:
        return Path(options.cache_dir).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "atoll")


def _validates(options: DataOptions) -> bool:
    return bool(options.valid_paths) or options.valid_fraction > 0


def _check_length(options: DataOptions, cache: Cache, seq_len: int) -> None:
    """ValueError where a split has not one sequence."""
    train, valid = cache.meta.tokens["train"], cache.meta.tokens["valid"]
    too_few = f"fewer than the train.seq_len + 1 = {seq_len + 1:,} of one sequence"
    if train <= seq_len and train + valid > seq_len and not options.valid_paths:
        raise ValueError(
            f"data.valid_fraction={options.valid_fraction} leaves {train:,} of {train + valid:,} tokens to train on, "
            f"{too_few}; lower data.valid_fraction or train.seq_len, or name data.valid_paths"
        )
    if train <= seq_len:
        where = f"data.paths={options.paths}" if options.paths else f"data.source={options.source}"
        raise ValueError(f"{where} gives {train:,} tokens, {too_few}; give more text, or lower train.seq_len")
    if _validates(options) and valid <= seq_len:
        name = "valid_paths" if options.valid_paths else "valid_fraction"
        raise ValueError(
            f"data.{name}={getattr(options, name)} holds out {valid:,} tokens in "
            f"{cache.meta.documents['valid']:,} documents, {too_few}; hold out more, lower train.seq_len, "
            f"or train without validation: data.valid_fraction=0 and no data.valid_paths"
        )
