"""Text to token ids and back: bytes, a ``tokenizer.json``, or a Hugging Face tokenizer.

Every tokenizer has one end-of-text token, which is written after each document. Special tokens that a tokenizer would
add around a text (begin-of-sentence and the like) are not added, and its truncation and padding are off.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.data.extras import MissingExtra, need

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
"""What a ``tokenizer.json``, which does not say it, may call its end-of-text token; the first one found is taken."""


class Tokenizer(Protocol):
    vocab_size: int
    """One more than the largest id."""
    end_of_text: int
    """The id written after each document."""
    identity: str
    """Equal for two tokenizers only if they give the same ids."""

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        """The ids of each text (valid UTF-8), 1-D, of any integer dtype."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text; what cannot be decoded appears as U+FFFD, or, with Hugging Face tokenizers, not at all."""


class Bytes:
    """One token a byte. The end of text is 0xFF, which no UTF-8 text holds: 256 ids, each stored in one byte."""

    vocab_size = 256
    end_of_text = 0xFF
    identity = "bytes"

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have a padded vocabulary and produce ids past 255; 0xFE is no UTF-8 either.
        text = bytes(i if i < 256 else 0xFE for i in ids)
        return text.replace(b"\xff", END_OF_TEXT[0].encode()).decode(errors="replace")


class TokenizerJson:
    """A ``tokenizer.json`` of the `tokenizers` library, which encodes a batch on all cores."""

    def __init__(self, path: Path) -> None:
        library = need("tokenizers", f"data.tokenizer={path}")
        content = path.read_bytes()
        self._tokenizer = library.Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()  # both may be set in the file, and would silently cut or fill documents
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        name = next((name for name in END_OF_TEXT if name in ids), None)
        if name is None:
            raise ValueError(
                f"it has no end-of-text token (none of {' '.join(END_OF_TEXT)}); "
                f"give the folder of a Hugging Face tokenizer, whose tokenizer_config.json names its eos_token"
            )
        self.end_of_text: int = ids[name]
        self.vocab_size = max(ids.values()) + 1
        self.identity = hashlib.sha256(content).hexdigest()

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        batch = self._tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in batch]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class HuggingFace:
    """A tokenizer of `transformers`, from a folder or by name; its ``eos_token`` ends a document."""

    def __init__(self, name: str) -> None:
        library = need("transformers", f"data.tokenizer={name}")
        self._tokenizer = library.AutoTokenizer.from_pretrained(name)
        if self._tokenizer.eos_token_id is None:
            raise ValueError("it has no eos_token, which must end each document; set one in its tokenizer_config.json")
        vocabulary = self._tokenizer.get_vocab()
        self.end_of_text: int = self._tokenizer.eos_token_id
        self.vocab_size = max(vocabulary.values()) + 1
        backend = self._tokenizer.backend_tokenizer.to_str() if self._tokenizer.is_fast else repr(self._tokenizer)
        content = json.dumps([backend, vocabulary, self.end_of_text], sort_keys=True)
        self.identity = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        batch = self._tokenizer(
            [text.decode() for text in texts],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,  # or each document longer than the model's context is warned of
        )
        return [np.asarray(ids, np.uint32) for ids in batch["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``. ValueError where it is missing or has no end-of-text token."""
    if name == "bytes":
        return Bytes()
    try:
        return TokenizerJson(Path(name).expanduser()) if name.endswith(".json") else HuggingFace(_expanded(name))
    except MissingExtra:
        raise
    except Exception as error:  # the libraries raise bare Exception, OSError, KeyError … for a bad file
        raise ValueError(
            f"data.tokenizer={name}: {error}; "
            f"allowed are bytes, a tokenizer.json, and the folder or name of a Hugging Face tokenizer"
        ) from error


def _expanded(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~") else name
