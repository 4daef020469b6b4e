"""What a step's activations take on the device and in host memory, for each thing that blocks may do with them.

A block of each kind (the largest figures count for all) and the head are run under fake tensors, which computes nothing
and takes no memory, at the job's own sizes; the rest is arithmetic. `atoll plan` shows it and ``parallel=auto`` reckons
with it, and a run that is out of memory names by it what would fit. An α that is not chosen yet counts as 1, which
takes most.

Not counted: kernels' workspaces, what the compiler fuses away (a compiled block takes less while it runs), and holes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from offload.activations.plan import BlockCost
from offload.activations.stream import can_stream
from offload.activations.watch import intercept, watched
from offload.options import ActivationOptions
from offload.plan import Recorder, load_bytes
from parallel.cut import move_without_memory
from parallel.sequence import SequenceParallel
from trainer.job import Job
from trainer.models import build_model


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes, of one micro-batch on one rank."""

    num_blocks: int
    input_bytes: int
    attention_bytes: int
    """Of what attention returns and saves besides its inputs."""
    rest_bytes: int
    """Of the products of a block, but for a last one after which nothing is saved."""
    kept_bytes: int
    """Of what a block saves that keeps everything, its input included."""
    work_bytes: int
    """The most that a block's forward and backward hold beside what it saves."""
    head_bytes: int
    """The most that the head and its loss hold."""
    mask_bytes: int = 0
    """Of masks that blocks are given."""
    stream_bytes: int | None = None
    """The most that a block holds that runs by tiles, or the head beside it; None for a model whose blocks cannot."""

    def cost(self, forward_s: float) -> BlockCost:
        return BlockCost(
            forward_s=forward_s,
            input_bytes=self.input_bytes,
            attention_bytes=self.attention_bytes,
            rest_bytes=self.rest_bytes,
            kept_bytes=self.kept_bytes,
        )

    def host_bytes(self, options: ActivationOptions, room: float = math.inf) -> tuple[int, int]:
        """In host memory, and on drives behind it where it has `room` for fewer than all blocks that swap."""
        if not options.swaps:
            return 0, 0
        num_away = self.num_blocks - options.num_kept(self.num_blocks)
        more = 0 if options.input_alone else self.attention_bytes + int(_alpha(options) * self.rest_bytes)
        each = self.input_bytes + more
        num = int(min(num_away, room // each))
        return num * each, (num_away - num) * each

    def device_bytes(self, options: ActivationOptions) -> int:
        """At the peak: what blocks hold between forward and backward, and the block or head that runs.

        With ``swap`` and ``input``: two buffers, or two blocks' worth on the way out, see `offload.activations`.
        """
        n, least = self.num_blocks, self.input_bytes + self.attention_bytes
        if options.streams and self.stream_bytes is not None:
            return self.stream_bytes
        running = max(self.work_bytes + self.kept_bytes, self.head_bytes) + self.mask_bytes
        if options.mode == "keep":
            return n * self.kept_bytes + max(self.work_bytes, self.head_bytes) + self.mask_bytes
        if options.mode == "checkpoint":
            return n * self.input_bytes + running
        if options.mode == "recompute":
            return n * least + running
        kept = options.num_kept(n)
        whole = self.input_bytes if options.mode == "input" else least + (self.rest_bytes if _alpha(options) else 0)
        return kept * self.kept_bytes + 2 * whole + running


def _alpha(options: ActivationOptions) -> float:
    if options.streams:
        return 0.0
    return 1.0 if options.alpha is None else options.alpha


class _Reached(Exception):
    """Ends a forward at the first block, whose arguments are known."""


def footprint(job: Job, *, vocab_size: int, micro_batch_size: int, dtype: torch.dtype) -> Footprint:
    """By running a block and the head under fake tensors; takes a second or two. Of sequences that ranks share, the
    longest part, and attention of all tokens and a rank's heads.

    vocab_size: the tokenizer's.
    """
    cpu = torch.device("cpu")
    sequence = SequenceParallel.pretended(job.parallel.sequence_ranks)
    num_tokens = sequence.lengths(job.train.seq_len)[0]
    model = build_model(job.model, vocab_size=vocab_size, seq_len=num_tokens, dtype=dtype, device=cpu)
    move_without_memory(model, dtype, cpu)
    options = job.offload.activations
    if not options.streams or model.tiles():
        model.run_by_tiles(replace(options, mode="keep", alpha=None))
    blocks = model.blocks()
    fake = FakeTensorMode()
    _pretend(model, fake)
    with fake:
        tokens = torch.zeros(micro_batch_size, num_tokens, dtype=torch.int64)
        args, kwargs = _arguments(model, blocks[0], tokens)
        if sequence.size > 1 and "attention_mask" in kwargs:
            kwargs["attention_mask"] = None  # transformers makes one of fake tensors, and none in a run
        with sequence.attention(job.train.seq_len):
            sizes = _largest([_block(block, args, kwargs) for block in _kinds(blocks)])
        keys_bytes = sizes.pop("keys_bytes")
        head, x = model.units()[-1], args[0]
        sizes["head_bytes"] = _head(head, x, tokens)
        if can_stream(blocks[0]):
            tile_tokens = min(num_tokens, max(1, options.stream_tokens // micro_batch_size))
            with sequence.attention(tile_tokens * sequence.size):
                most = _stream(blocks[0], args, tile_tokens, keys_bytes)
            if sizes["head_bytes"] > most:  # less where its norm runs by tiles, too
                model.run_by_tiles(replace(options, mode="stream", alpha=None))
                most = max(most, _head(head, x, tokens))
            sizes["stream_bytes"] = most
        sizes["mask_bytes"] = model.mask_bytes(micro_batch_size, num_tokens)
        return Footprint(num_blocks=len(blocks), **sizes)


def _stream(block: nn.Module, args: tuple[Any, ...], tile_tokens: int, keys_bytes: int) -> int:
    """The most that a block holds which runs by tiles of so many tokens of each sequence, in its backward: the
    gradients of its output and input; keys, values and their fp32 gradients; what it holds of a tile, and two tiles on
    their way."""
    x, *tables = args
    whole, tile = x.nbytes, slice(0, tile_tokens)
    part = _block(block, (x[:, tile].detach().requires_grad_(), *(table[tile] for table in tables)), {})
    moving = 2 * (part["input_bytes"] + part["attention_bytes"])
    grads_bytes = keys_bytes * 4 // x.itemsize
    return int(2 * whole + keys_bytes + grads_bytes + part["kept_bytes"] + part["work_bytes"] + moving)


def _pretend(model: nn.Module, fake: FakeTensorMode) -> None:
    """Give `model` fake parameters and buffers; it is built before, as a model may look at its own values then."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            with fake:  # with memory, as far as anyone can see: grouped products refuse strides of 0
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fake.from_tensor(buffer))


def _arguments(model: nn.Module, block: nn.Module, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model gives its first block."""
    found: list[Any] = []

    def reached(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.extend((args, kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(reached, with_kwargs=True)
    try:
        model(tokens, tokens)
    except _Reached:
        pass
    finally:
        handle.remove()
    args, kwargs = found
    return (args[0].detach().requires_grad_(), *args[1:]), kwargs


def _block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    products: list[tuple[int, int]] = []  # bytes, and how many tensors were saved when it was there
    attention: list[int] = []
    keys: list[int] = []
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}
    fixed = {id(t.untyped_storage()) for t in (*block.parameters(), *block.buffers(), *_others(args, kwargs))}

    num_saved = 0

    def watcher(kind: str, inputs: Any, call: Any) -> Tensor:
        out: Tensor = call()
        if kind == "linear":
            products.append((out.nbytes, num_saved))
        else:  # beside it, a sum of the softmax a query, fp32
            keys.append(inputs[1].nbytes + inputs[2].nbytes)
            attention.append(out.nbytes + 4 * out.numel() // out.size(-1))
        return out

    def pack(tensor: Tensor) -> Tensor:
        nonlocal num_saved
        storage = tensor.untyped_storage()
        if id(storage) not in fixed:
            num_saved += 1
            kept[id(storage)] = storage, storage.nbytes()
        return tensor

    for module in block.modules():
        intercept(module)
    with Recorder() as recorder:
        with saved_tensors_hooks(pack, lambda t: t), watched(watcher):
            out = block(*args, **kwargs)
        out = out if isinstance(out, Tensor) else out[0]
        kept_bytes = sum(size for _, size in kept.values())
        kept.clear()
        weights = [p for p in block.parameters() if p.requires_grad]
        torch.autograd.grad(out, [args[0], *weights], torch.empty_like(out))
        most = load_bytes(recorder.requests())
    input_bytes = args[0].nbytes
    return {
        "input_bytes": input_bytes,
        "attention_bytes": sum(attention),
        "rest_bytes": sum(size for size, before in products if before < num_saved),
        "keys_bytes": sum(keys),
        "kept_bytes": kept_bytes,
        "work_bytes": max(0, most + input_bytes - kept_bytes),
    }


def _kinds(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """One of each, the first first: models may have layers with experts and others without."""
    kinds: dict[tuple[type, ...], nn.Module] = {}
    for block in blocks:
        kinds.setdefault(tuple(map(type, block.modules())), block)
    return list(kinds.values())


def _largest(sizes: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: max(one[name] for one in sizes) for name in sizes[0]}


def _others(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors that a block gets besides what it works on: tables of positions, masks."""
    for value in (*args[1:], *kwargs.values()):
        yield from _tensors(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _head(head: nn.Module, x: Tensor, targets: Tensor) -> int:
    with Recorder() as recorder:
        loss = head(x, targets)
        torch.autograd.grad(loss, [x, *(p for p in head.parameters() if p.requires_grad)])
        return load_bytes(recorder.requests())


def alternatives(options: ActivationOptions, *, streams: bool = False) -> dict[str, ActivationOptions]:
    """What else blocks could do, by the override. Those that take less of the device come later. streams: whether they
    could run by tiles."""
    plain = replace(options, mode="keep", alpha=None)
    by_tiles = {f"offload.activations={mode}": replace(plain, mode=mode) for mode in ("stream", "stream_input")}
    found = {
        "offload.activations=keep": plain,
        "offload.activations=swap offload.activations.alpha=1": replace(plain, mode="swap", alpha=1.0),
        "offload.activations=recompute": replace(plain, mode="recompute"),
        "offload.activations=checkpoint": replace(plain, mode="checkpoint"),
        "offload.activations=swap offload.activations.alpha=0 offload.activations.keep_last=0": replace(
            plain, mode="swap", alpha=0.0, keep_last=0
        ),
        "offload.activations=input offload.activations.keep_last=0": replace(plain, mode="input", keep_last=0),
        **(by_tiles if streams else {}),
    }
    if options.alpha is None:
        return found
    return {
        text if one.alpha is not None else f"{text} offload.activations.alpha=null": one for text, one in found.items()
    }
