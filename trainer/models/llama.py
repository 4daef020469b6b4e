"""A Llama (arXiv 2302.13971): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Shapes: B sequences of S tokens, D = dim, F = ffn_dim, H query heads and K key-value heads of size E, V words.
Projections that read the same input are one parameter and one GEMM: ``qkv`` stacks the rows of Hugging Face's q, k and
v, ``gate_up`` those of gate and up; `trainer.models.export` takes them apart.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload.state import Read
from trainer.models.base import LanguageModel
from trainer.models.loss import linear_cross_entropy
from trainer.models.random_init import RandomRead
from trainer.models.swiglu import swiglu
from trainer.options import LlamaOptions

Attend = Callable[[Tensor], Tensor]
"""From queries (B, H, S, E) to what attention makes of them."""


class Llama(LanguageModel):
    cos: Tensor
    sin: Tensor

    def __init__(
        self, options: LlamaOptions, *, vocab_size: int, seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """vocab_size: the tokenizer's, which ``options.vocab_size`` may raise; seq_len: the longest sequence."""
        super().__init__()
        self.options = options
        self.vocab_size = options.vocab_size or vocab_size
        if self.vocab_size < vocab_size:
            raise ValueError(
                f"model.vocab_size={options.vocab_size} is less than the tokenizer's {vocab_size}; "
                f"set model.vocab_size={vocab_size} or more, or null to take the tokenizer's"
            )
        on_meta: dict[str, Any] = {"device": torch.device("meta"), "dtype": dtype}
        self.embed = nn.Embedding(self.vocab_size, options.dim, **on_meta)
        self.layers = nn.ModuleList(Block(options, **on_meta) for _ in range(options.num_layers))
        self.head = Head(options, self.vocab_size, **on_meta)
        if options.tie_embeddings:
            self.head.output.weight = self.embed.weight
        cos, sin = rotary_tables(seq_len, options.head_dim, options.rope_theta, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, start: int = 0) -> Tensor:
        stop = start + tokens.size(1)
        if stop > len(self.cos):
            raise ValueError(f"{stop} tokens a sequence, the model was built for train.seq_len={len(self.cos)}")
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        x: Tensor = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.head(x, targets)
        return x

    def units(self) -> list[nn.Module]:
        return [self.embed, *self.layers, self.head]

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def around(self) -> list[nn.Module]:
        return [self.head.norm]

    @property
    def num_heads(self) -> tuple[int, int]:
        return self.options.num_heads, self.options.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.options.head_dim

    def flops_per_token(self, seq_len: int) -> int:
        """6 N + 6 L H E S, where N counts every parameter: the embedding too, as published figures do."""
        o = self.options
        num_params = sum(p.numel() for p in self.parameters())
        return 6 * num_params + 6 * o.num_layers * o.num_heads * o.head_dim * seq_len

    def initial(self, seed: int, device: torch.device) -> Read:
        """Normal with ``init_std``; what is added to the residual stream scaled by 1 / sqrt(2 L) (GPT-2); norms 1."""
        residual_std = self.options.init_std / math.sqrt(2 * self.options.num_layers)

        def std(name: str) -> float | None:
            if name.endswith("norm.weight"):
                return None
            return residual_std if name.endswith(("attention.out.weight", "mlp.down.weight")) else self.options.init_std

        shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}
        return RandomRead(shapes, std, seed, device)


class Block(nn.Module):
    def __init__(self, options: LlamaOptions, **on_meta: Any) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(options.dim, options.norm_eps, **on_meta)
        self.attention = Attention(options, **on_meta)
        self.mlp_norm = nn.RMSNorm(options.dim, options.norm_eps, **on_meta)
        self.mlp = MLP(options, **on_meta)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, S, D); cos, sin (S, E/2)."""
        return self.tile(x, cos, sin, None)

    def tile(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend | None) -> Tensor:
        """The block on some of the tokens, at their positions; attend: what attention makes of their queries (B, H, S,
        E). With `keys` what a block offers that runs by tiles of tokens (`offload.activations.stream`)."""
        x = x + self.attention(self.attention_norm(x), cos, sin, attend)
        x = x + self.mlp(self.mlp_norm(x))
        return x

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some of the tokens, each (B, K, S, E)."""
        return self.attention.keys(self.attention_norm(x), cos, sin)


class Attention(nn.Module):
    def __init__(self, options: LlamaOptions, **on_meta: Any) -> None:
        super().__init__()
        self.head_dim = options.head_dim
        self.heads = [options.num_heads, options.num_kv_heads, options.num_kv_heads]
        self.num_rows = options.num_heads * options.head_dim
        """Of ``qkv``'s weight, the first, that make queries."""
        self.qkv = nn.Linear(options.dim, sum(self.heads) * self.head_dim, bias=False, **on_meta)
        self.out = nn.Linear(options.num_heads * self.head_dim, options.dim, bias=False, **on_meta)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend | None = None) -> Tensor:
        if attend is None:
            q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=-2)  # (B, S, H or K, E)
            # v gets its own memory: a view would keep q and k as they were before their rotation until the backward.
            q, k, v = rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # views: the kernels take any strides
            grouped = self.heads[0] != self.heads[1]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            q = F.linear(x, self.qkv.weight[: self.num_rows]).unflatten(-1, (-1, self.head_dim))
            y = attend(rotate(q, cos, sin).transpose(1, 2))
        x = self.out(y.transpose(1, 2).flatten(2))
        return x

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        kv = F.linear(x, self.qkv.weight[self.num_rows :]).unflatten(-1, (-1, self.head_dim))
        k, v = kv.split(self.heads[1:], dim=-2)
        return rotate(k, cos, sin).transpose(1, 2), v.contiguous().transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, options: LlamaOptions, **on_meta: Any) -> None:
        super().__init__()
        self.gate_up = nn.Linear(options.dim, 2 * options.ffn_dim, bias=False, **on_meta)
        self.down = nn.Linear(options.ffn_dim, options.dim, bias=False, **on_meta)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate_up(x)
        x = self.down(swiglu(x))
        return x


class Head(nn.Module):
    """The last norm, the output projection and its loss: one unit, so its logits never leave it."""

    def __init__(self, options: LlamaOptions, vocab_size: int, **on_meta: Any) -> None:
        super().__init__()
        self.chunk_tokens = options.loss_chunk_tokens
        self.norm = nn.RMSNorm(options.dim, options.norm_eps, **on_meta)
        self.output = nn.Linear(options.dim, vocab_size, bias=False, **on_meta)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            x = self.output(self.norm(x[:, -1]))
            return x
        return linear_cross_entropy(self.norm(x), self.output.weight, targets, chunk_tokens=self.chunk_tokens)


def rotary_tables(seq_len: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency (arXiv 2104.09864), each (seq_len, head_dim / 2) fp32."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)
    return angles.cos().to(device), angles.sin().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns element i and element i + E/2 of each head as one plane, as in Hugging Face's weights. x (B, S, H, E)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)  # fp32 until here
