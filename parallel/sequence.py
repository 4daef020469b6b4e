"""Sequence parallelism: a rank has a part of the tokens, and during attention all of them for a part of the heads.

Only attention looks at other tokens. Before it an all-to-all gives each rank all tokens of its share of the heads,
after it another brings every rank's tokens back with all heads (Ulysses). For each of S tokens a rank then sends
(2H + 2K) / P heads, with H query heads, K key-value heads and P ranks; a ring passes on all keys and values.

- P must divide H. Key-value heads that it does not divide are repeated, only as often as needed, so that each rank has
  those that its query heads ask for; their gradients are summed by the same repetition.
- Lengths may be uneven: the first ranks have a token more.

Everything else is local to a token, so a model runs on its part as it is, if its positions are those of its part:
within `SequenceParallel.attention` our attention stands in for `torch.nn.functional.scaled_dot_product_attention`. The
mean over all tokens is the sum over ranks of the mean over a part times `share`, and so are the gradients of weights.

Blocks that run by tiles attend for themselves, and share tile after tile by `to_heads` and `to_tokens`
(`offload.activations.attention_spread`).

Source: arXiv 2309.14509 (DeepSpeed Ulysses).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from offload.activations.watch import told
from parallel.mesh import Mesh


class SequenceParallel:
    """The ranks that share a sequence."""

    def __init__(self, group: dist.ProcessGroup | None, *, number: int = 0, count: int = 1) -> None:
        """group: those ranks in the order of their tokens; None: this one alone. number: of `count` such groups."""
        self.group, self.number, self.count = group, number, count
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        self._kernel: Any = None
        self._num_tokens = 0

    @classmethod
    def of(cls, mesh: Mesh, level: str) -> "SequenceParallel":
        """Over one level of `mesh`. Collective over the world. ValueError for a level that it does not have."""
        if level not in mesh.names:
            raise ValueError(f"parallel.sequence={level}: the levels are {', '.join(mesh.names)} (parallel.levels)")
        place = mesh.names.index(level)
        size, inner = mesh.sizes[place], math.prod(mesh.sizes[place + 1 :])
        number = mesh.rank // (inner * size) * inner + mesh.rank % inner
        return cls(mesh.group(place, place + 1), number=number, count=mesh.world // size)

    @classmethod
    def pretended(cls, size: int) -> "SequenceParallel":
        """The first of `size` ranks, without the others: what it would send comes back to it. So it computes and holds
        what it would among them, which is there to be measured, or to be counted under fake tensors."""
        first = cls(None)
        first.size = size
        return first

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """ValueError where the heads cannot be shared."""
        if num_heads % self.size:
            raise ValueError(
                f"a sequence over {self.size} ranks (parallel.sequence): each takes as many of the query heads, but "
                f"{num_heads} are not divisible by {self.size}; choose a level whose size divides model.num_heads"
            )
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads, {num_kv_heads} key and value heads: must divide the first")

    def lengths(self, num_tokens: int) -> list[int]:
        """How many of `num_tokens` each rank has. ValueError where one would have none."""
        if num_tokens < self.size:
            raise ValueError(f"{num_tokens} tokens a sequence over {self.size} ranks: each needs one (train.seq_len)")
        return [num_tokens // self.size + (rank < num_tokens % self.size) for rank in range(self.size)]

    def part(self, num_tokens: int) -> slice:
        """This rank's tokens."""
        lengths = self.lengths(num_tokens)
        start = sum(lengths[: self.rank])
        return slice(start, start + lengths[self.rank])

    def share(self, num_tokens: int) -> float:
        """What the mean over this rank's tokens weighs in the mean over all."""
        return self.lengths(num_tokens)[self.rank] / num_tokens

    @contextmanager
    def attention(self, num_tokens: int) -> Iterator[None]:
        """Within it models' attention is over all `num_tokens`. The backward belongs inside if attention is recomputed.

        Not to be nested.
        """
        if self.size == 1:
            yield
            return
        self._kernel, self._num_tokens = F.scaled_dot_product_attention, num_tokens
        _stand_in.spread = self  # for blocks that run by tiles, which attend for themselves
        F.scaled_dot_product_attention = _stand_in
        try:
            yield
        finally:
            F.scaled_dot_product_attention = self._kernel
            _stand_in.spread = None  # or the group, and its connections, would outlive `dist.destroy_process_group`

    def attend_within(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`attend`, within `attention`."""
        return self.attend(query, key, value, self._num_tokens, self._kernel, *args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_tokens: int,
        kernel: Any,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention over the tokens of all ranks, by `kernel`: torch's scaled_dot_product_attention or alike.

        query (B, H, S, E), key and value (B, K, S, E), S this rank's part of `num_tokens`; returns (B, H, S, E).
        ValueError for heads that cannot be shared, another part, a mask or dropout.
        """
        if self.size == 1:
            alone: Tensor = kernel(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return alone
        lengths = self.lengths(num_tokens)
        self._check(query, key, value, lengths, attn_mask, dropout_p)
        if not enable_gqa and query.size(1) != key.size(1):
            raise ValueError(
                f"{query.size(1)} query heads, {key.size(1)} key heads: must be as many without enable_gqa"
            )
        whole = self.to_heads((query, key, value), lengths)
        q, k, v = (t.transpose(1, 2) for t in whole)
        # whoever stores activations stores what the kernel makes; what is sent to make its inputs is sent again
        out = told(kernel, q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.size(1) != k.size(1))
        return self.to_tokens(out.transpose(1, 2), lengths)

    # `offload.activations.attention_spread.Spread`, for blocks that run by tiles

    def tokens(self) -> list[int]:
        """Of each rank, within `attention`."""
        return self.lengths(self._num_tokens)

    def to_heads(self, tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """From (B, heads, S, E) each, S this rank's of `lengths`, to (B, all S, this rank's heads, E): one collective.
        Heads that the ranks do not divide are repeated. Where widths differ a collective for each."""
        if len({tensor.size(-1) for tensor in tensors}) > 1:
            return [one for tensor in tensors for one in self.to_heads((tensor,), lengths)]
        counts, shares = [], []
        for tensor in tensors:
            repeats = math.lcm(tensor.size(1), self.size) // tensor.size(1)
            if repeats > 1:
                tensor = tensor.repeat_interleave(repeats, dim=1)
            counts.append(tensor.size(1) // self.size)
            # (B, S, P, heads, E): what goes to one rank lies side by side
            shares.append(tensor.transpose(1, 2).unflatten(2, (self.size, counts[-1])))
        whole: Tensor = _ToHeads.apply(torch.cat(shares, dim=3), list(lengths), self.group, self.rank)  # type: ignore[no-untyped-call]
        return list(whole.split(counts, dim=2))

    def to_tokens(self, whole: Tensor, lengths: Sequence[int]) -> Tensor:
        """Back from (B, all S, this rank's heads, E) to (B, heads, S, E)."""
        back: Tensor = _ToTokens.apply(whole, list(lengths), self.group, self.rank)  # type: ignore[no-untyped-call]
        return back.flatten(2, 3).transpose(1, 2)

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], mask: Tensor | None, dropout: float
    ) -> None:
        self.check_heads(query.size(1), key.size(1))
        if mask is not None or dropout:
            raise ValueError(
                "a sequence over several ranks (parallel.sequence) takes no attention mask and no dropout of attention "
                "(Hugging Face's: model.overrides.attention_dropout=0, GPT-2's attn_pdrop); leave parallel.sequence out"
            )
        found = {t.size(2) for t in (query, key, value)}
        if found != {lengths[self.rank]}:
            raise ValueError(
                f"rank {self.rank} of {self.size} has {lengths[self.rank]} of {sum(lengths)} tokens, but attention got "
                f"{sorted(found)}"
            )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _stand_in(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Within `SequenceParallel.attention`; one for ever, or blocks compiled with another are compiled again."""
    found: Tensor = _stand_in.spread.attend_within(query, key, value, *args, **kwargs)
    return found


_stand_in.tells = True


def _exchange(
    out: Tensor, sent: Tensor, received: list[int], given: list[int], group: dist.ProcessGroup | None
) -> None:
    """So many elements of `sent` to each rank, and of `out` from each; without a group they come back."""
    if group is not None:
        dist.all_to_all_single(out, sent, received, given, group=group)
        return
    num = min(out.numel(), sent.numel())  # parts may be uneven
    out[:num].copy_(sent[:num])
    out[num:].zero_()


def _to_heads(x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """(B, S of this rank, P, heads, E) to (B, all S, heads, E)."""
    batch, _, size, heads, width = x.shape
    token = batch * heads * width
    out = torch.empty(token * sum(lengths), dtype=x.dtype, device=x.device)
    sent = x.permute(2, 0, 1, 3, 4).contiguous().flatten()
    _exchange(out, sent, [token * n for n in lengths], [sent.numel() // size] * size, group)
    if batch == 1:  # the parts already lie one after the other
        return out.view(1, sum(lengths), heads, width)
    parts = out.split([token * n for n in lengths])
    return torch.cat([part.view(batch, n, heads, width) for part, n in zip(parts, lengths, strict=True)], dim=1)


def _to_tokens(x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup | None, rank: int) -> Tensor:
    """(B, all S, heads, E) to (B, S of this rank, P, heads, E); undoes `_to_heads`."""
    batch, _, heads, width = x.shape
    token, size, mine = batch * heads * width, len(lengths), lengths[rank]
    sent = x.contiguous().flatten() if batch == 1 else torch.cat([part.flatten() for part in x.split(list(lengths), 1)])
    out = torch.empty(size * token * mine, dtype=x.dtype, device=x.device)
    _exchange(out, sent, [token * mine] * size, [token * n for n in lengths], group)
    return out.view(size, batch, mine, heads, width).permute(1, 2, 0, 3, 4)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], group: dist.ProcessGroup | None, rank: int) -> Tensor:
        ctx.lengths, ctx.group, ctx.rank = lengths, group, rank
        return _to_heads(x, lengths, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _to_tokens(grad, ctx.lengths, ctx.group, ctx.rank), None, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], group: dist.ProcessGroup | None, rank: int) -> Tensor:
        ctx.lengths, ctx.group = lengths, group
        return _to_tokens(x, lengths, group, rank)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _to_heads(grad, ctx.lengths, ctx.group), None, None, None
