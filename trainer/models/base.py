"""What the trainer needs of a language model."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from offload.activations.tiles import can_tile, tile
from offload.options import ActivationOptions
from offload.state import Read


class LanguageModel(nn.Module, ABC):
    """A causal language model whose parameters were made on ``meta`` and whose buffers are real.

    The engine gives the parameters their memory, unit by unit, so no rank ever holds the whole model.
    """

    vocab_size: int

    @abstractmethod
    def forward(self, tokens: Tensor, targets: Tensor | None = None, start: int = 0) -> Tensor:
        """tokens, targets: (B, S) int64. Returns the mean cross-entropy in nats, 0-dim fp32; without targets the
        logits that follow the last position, (B, V). start: position of the first token, where S is a part of a
        sequence."""

    @property
    @abstractmethod
    def num_heads(self) -> tuple[int, int]:
        """Of queries, and of keys and values."""

    @property
    @abstractmethod
    def head_dim(self) -> int: ...

    @abstractmethod
    def units(self) -> list[nn.Module]:
        """Disjoint submodules in the order they run: what is gathered, computed and released together. Parameters
        outside them, or shared by several, belong to the root unit."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated units: what is compiled and, if asked, recomputed."""

    def tiles(self) -> list[nn.Module]:
        """Submodules that may run over a few tokens at a time: the MLPs of blocks, where they are plain."""
        mlps = [getattr(block, "mlp", None) for block in self.blocks()]
        return [mlp for mlp in mlps if isinstance(mlp, nn.Module) and can_tile(mlp)]

    def around(self) -> list[nn.Module]:
        """Modules outside the blocks that look at one token at a time and take more than their input: where blocks run
        by tiles, they do."""
        return []

    def run_by_tiles(self, options: ActivationOptions) -> None:
        """Have what `options` say run over a few tokens at a time, but for the blocks. ValueError where there is no
        such thing."""
        if options.streams and self.around():
            tile(self.around(), options.stream_tokens)
        elif options.tile_tokens is not None and not options.streams:
            tile(self.tiles(), options.tile_tokens)

    def mask_bytes(self, batch_size: int, seq_len: int) -> int:
        """Of masks of attention that blocks are given, and that stay for the whole step."""
        return 0

    def check_shared(self, seq_len: int, ranks: int) -> None:
        """ValueError where `ranks` cannot share its sequences: tokens may meet in causal attention over all of them
        alone, by `torch.nn.functional.scaled_dot_product_attention` (`parallel.sequence`)."""

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> int:
        """Model FLOPs of forward and backward: 6 a parameter that multiplies, and causal attention at half
        (6 * layers * heads * head_dim * seq_len); no recomputation."""

    @abstractmethod
    def initial(self, seed: int, device: torch.device) -> Read:
        """Where the first weights come from: ``read(name, "master", start, stop)``, a function of the seed and the name
        alone (random), or of the model's files."""
