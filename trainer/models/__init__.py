"""The models: a Llama of our own, and any Hugging Face causal language model, behind one interface."""

import torch

from trainer.models.base import LanguageModel
from trainer.options import HFOptions, LlamaOptions, ModelOptions

__all__ = ["LanguageModel", "build_model"]


def build_model(
    options: ModelOptions, *, vocab_size: int, seq_len: int, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    """The model that `options` describe: parameters on ``meta`` in `dtype`, the compute dtype; buffers on `device`.

    vocab_size: the tokenizer's. ValueError for options that do not fit each other, the data or the model's files.
    """
    if isinstance(options, LlamaOptions):
        from trainer.models.llama import Llama

        return Llama(options, vocab_size=vocab_size, seq_len=seq_len, dtype=dtype, device=device)
    if isinstance(options, HFOptions):
        from trainer.models.hf import HFModel  # transformers takes seconds to import

        return HFModel(options, vocab_size=vocab_size, seq_len=seq_len, dtype=dtype, device=device)
    raise TypeError(f"build_model takes LlamaOptions or HFOptions, not {type(options).__name__}")
