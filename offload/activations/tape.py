"""What a block's forward leaves for its backward, when most of it is not kept.

[Note: what is stored, what is rebuilt] A Tape records one forward of a block. It keeps
- the block's input and what attention saves for itself (its output and the sums of its softmax), whole;
- of each matrix product of an `nn.Linear`, the results of the first α of the tokens;
and nothing else. The backward first *replays* the block: the same Python runs again, but attention returns its stored
output, a product returns its stored rows beside those that it computes again, and what is elementwise (norms,
rotations, SwiGLU, residual sums) is done again on all tokens. A tape without `attention` keeps the input alone, and
attention is done again as all else is. What the operators of the replay save is, one by one,
what those of the recording saved: `saved_tensors_hooks` counts them. The replay ends with the last tensor that is
wanted, so the last product is never computed.

So nothing has to know the model: whatever is neither a Linear nor `scaled_dot_product_attention` is recomputed, and
nothing but the products' rows is cut by tokens. With α = 0 or 1 the replay computes on the same shapes as the
recording: gradients are bitwise those of a block that keeps everything, where its kernels are deterministic. In
between, a product of fewer rows may round differently.

A block may be compiled: Linear and attention are graph breaks, and what lies between them is what is compiled.

Source: arXiv 2407.12117, section 4 (token-wise swapping and recomputation); the counting as in torch.utils.checkpoint.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from offload.activations.watch import product, rng_state, same, set_rng_state, watched, with_rng
from offload.weak import weakly

SMALL_BYTES = 64
"""What an operator saves below this (seeds of random numbers) stays where it is."""


class _Enough(Exception):
    """Ends a replay: all that is wanted is there."""


class Saved:
    """What autograd holds instead of a tensor. While one lives, so does its tape."""

    __slots__ = ("__weakref__", "tape", "tensor")

    def __init__(self, tape: "Tape") -> None:
        self.tape = tape
        self.tensor: Tensor | None = None

    def get(self) -> Tensor:
        if self.tensor is None:
            self.tape.restore(self.tape)
        assert self.tensor is not None
        return self.tensor


@dataclass(frozen=True)
class View:
    """A tensor as a view of another's memory; `offset` in elements from where that begins."""

    of: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def see(self, base: Tensor) -> Tensor:
        """The view, of another tensor in the place of the one it was taken of."""
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


@dataclass
class Source:
    """A stored tensor: its memory as one dimension, wherever that is."""

    kind: str
    """``input``, ``attention`` or ``rest``."""
    flat: Tensor | None
    """On the device; None while it is away."""
    numel: int
    stored: int
    """The first so many elements are stored, the others computed again."""
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        return self.stored * self.dtype.itemsize


@dataclass
class _Region:
    """A call whose result is stored, so that the replay need not make it."""

    start: int
    kind: str
    inputs: list[Tensor]
    """Of the recording; let go of when the call returns."""
    stop: int = 0
    output: View | None = None
    """A view of a source; None: the replay makes the call."""
    requires_grad: bool = True
    nbytes: int = 0
    """Of the result."""
    rng: tuple[Tensor, ...] | None = None
    """What random numbers come next, if the call took any."""
    aliases: dict[int, View] = field(default_factory=dict)
    """What the call saved that are its inputs, by number; `of` counts the inputs."""
    stored: dict[int, View] = field(default_factory=dict)
    """What else it saved; `of` counts the sources."""
    result: tuple[Tensor, int] | None = None
    """What is stored, and its version when it was, until the recording ends."""

    def forget(self) -> None:
        """Have the replay make the call."""
        self.kind, self.output, self.stored = "plain", None, {}


class Tape:
    """One forward of one block."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        alpha: float,
        attention: bool = True,
        measure: bool = False,
        pack: Callable[[Tensor], Any] | None = None,
        unpack: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """alpha: the fraction of the rows of each product that is stored, 0 to 1. attention: whether what attention
        saves is. measure: for `sizes`, also count what a block that keeps everything would hold.
        pack, unpack: another's hooks for saved tensors, asked first; what `pack` does not return unchanged is its."""
        self.sources: list[Source] = []
        self.saved: dict[int, weakref.ref[Saved]] = {}
        self.num_seen = 0
        self.regions: list[_Region] = []
        self.restore: Callable[[Tape], None] = Tape.replay
        """Called when the backward asks for the first tensor: brings the sources back and replays."""
        self._forward, self.alpha, self._pack_other, self._unpack_other = forward, alpha, pack, unpack
        self._leaves, self._spec = tree_flatten((args, kwargs))
        self._like: dict[int, tuple[torch.Size, torch.dtype]] = {}
        self._region: _Region | None = None
        self._last = -1
        self._attention, self._attention_bytes = attention, 0
        self._rng: tuple[Tensor, ...] | None = None
        self._inputs: dict[int, tuple[View, bool]] = {}
        """Of the flattened arguments, those that are stored, and whether gradients flow to them."""
        self._by_storage: dict[int, tuple[int, Tensor]] = {}
        self._kept: dict[int, weakref.ref[torch.UntypedStorage]] | None = {} if measure else None
        """What was saved, by id, which is unique while it lives."""
        self._kept_bytes = 0
        fixed = [t for t in (*module.parameters(), *module.buffers()) if isinstance(t, Tensor)]
        tensors = {place: leaf for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)}
        if not tensors:
            raise ValueError(f"{type(module).__name__} got no tensor: it is no block whose activations can leave")
        # Masks and tables of positions need no gradient; behind a frozen embedding the input does not either.
        moving = {place for place, leaf in tensors.items() if leaf.requires_grad} or {min(tensors)}
        for place, leaf in tensors.items():
            if place in moving:
                self._inputs[place] = self._store(leaf, "input"), leaf.requires_grad
            else:
                fixed.append(leaf)
        self._fixed = {t.untyped_storage().data_ptr() for t in fixed}
        first = tensors[min(moving)]
        self.device, self.num_tokens = first.device, max(1, first.numel() // first.size(-1))

    def sizes(self) -> dict[str, int]:
        """Bytes on the device by kind: ``input``, ``attention``, stored or not, and ``rest``, the products as if α were
        1; ``kept`` where that was measured."""
        linears = [region for region in self.regions if region.kind == "linear" and region.stop <= self._last]
        return {
            "input": self._bytes_of("input"),
            "attention": self._attention_bytes,
            "rest": sum(region.nbytes for region in linears),
            **({"kept": self._kept_bytes} if self._kept is not None else {}),
        }

    def _bytes_of(self, kind: str) -> int:
        return sum(source.nbytes for source in self.sources if source.kind == kind)

    # ------------------------------------------------------------------------------------------------ recording

    def record(self) -> Any:
        """Run the block; returns what it returns."""
        rng = rng_state(self.device)
        args, kwargs = tree_unflatten(self._leaves, self._spec)
        with saved_tensors_hooks(weakly(self._pack), _unpack), watched(self._record_call):
            result = self._forward(*args, **kwargs)
        self._rng = rng if not same(rng, rng_state(self.device)) else None
        self._finish()
        return result

    def _finish(self) -> None:
        self._last = max(self.saved, default=-1)
        self._forget_changed()
        self._drop_unused()
        self._attention_bytes = self._bytes_of("attention")
        if not self._attention:
            self.forget_attention()
        self._by_storage.clear()
        for place in self._inputs:
            self._leaves[place] = None

    def forget_attention(self) -> None:
        """Have the replay do attention again, and store nothing of it; before the sources leave."""
        for region in self.regions:
            if region.kind == "attention":
                region.forget()
        self._drop_unused()

    def _forget_changed(self) -> None:
        """What the block changed in place after it was made, as some activation functions do, is not what was made."""
        for region in self.regions:
            if region.result is not None and region.result[0]._version != region.result[1]:
                region.forget()
            region.result = None

    def _drop_unused(self) -> None:
        """Let go of the sources that a replay does not ask for."""
        used = {view.of for view, _ in self._inputs.values()}
        for region in self.regions:
            used |= {view.of for view in region.stored.values()}
            if region.output is not None and region.stop <= self._last:
                used.add(region.output.of)
        for number, source in enumerate(self.sources):
            if number not in used:  # of the last product: the replay ends before it
                source.flat, source.numel, source.stored = None, 0, 0

    def _pack(self, tensor: Tensor) -> Any:
        number = self.num_seen
        self.num_seen += 1
        if self._pack_other is not None and (handle := self._pack_other(tensor)) is not tensor:
            assert self._unpack_other is not None
            return _Other(handle, self._unpack_other)
        if (
            tensor.untyped_storage().data_ptr() in self._fixed
            or tensor.nbytes < SMALL_BYTES
            or tensor.device != self.device
        ):
            return tensor.detach()  # or an operator that saves its own result would hold itself
        if (region := self._region) is not None:
            alias = _view_among(tensor, region.inputs)
            if alias is not None:
                region.aliases[number] = alias
            elif region.kind == "attention":
                region.stored[number] = self._store(tensor, "attention")
            else:  # a Linear that saves a copy of its input: the replay has to make the call
                region.kind = "plain"
        if self._kept is not None:
            self._count(tensor.untyped_storage())
        saved = Saved(self)
        self.saved[number] = weakref.ref(saved)
        self._like[number] = tensor.shape, tensor.dtype
        return saved

    def _count(self, storage: torch.UntypedStorage) -> None:
        assert self._kept is not None
        known = self._kept.get(id(storage))
        if known is None or known() is not storage:
            self._kept[id(storage)] = weakref.ref(storage)
            self._kept_bytes += storage.nbytes()

    def _record_call(self, kind: str, inputs: Sequence[Tensor], call: Callable[[], Tensor]) -> Tensor:
        region = _Region(self.num_seen, kind, list(inputs))
        rng = rng_state(self.device) if kind == "attention" else ()
        self._region = region
        try:
            out = call()
        finally:
            self._region, region.inputs = None, []
        region.stop, region.requires_grad, region.nbytes = self.num_seen, out.requires_grad, out.nbytes
        if region.kind == "attention":
            after = rng_state(self.device)
            region.rng = after if not same(rng, after) else None
            region.output = self._store(out, "attention")
        elif region.kind == "linear" and (num_rows := int(self.alpha * (out.numel() // out.size(-1)))):
            region.output = self._store(out, "rest", num_rows * out.size(-1))
        if region.output is not None:
            region.result = out.detach(), out._version
        self.regions.append(region)
        return out

    def _store(self, tensor: Tensor, kind: str, stored: int | None = None) -> View:
        """Have a tensor among the sources; a view of one that is there is not stored again."""
        tensor = tensor.detach()  # or what is being copied out would hold the graph, and that this tape
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in self._by_storage:
            number, known = self._by_storage[pointer]
            view = _view_among(tensor, [known])
            if view is not None and self.sources[number].stored == self.sources[number].numel:
                return View(number, view.size, view.stride, view.offset)
        if not _is_dense(tensor):
            tensor = tensor.contiguous()
        flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
        self.sources.append(Source(kind, flat, flat.numel(), flat.numel() if stored is None else stored, flat.dtype))
        self._by_storage.setdefault(pointer, (len(self.sources) - 1, flat))
        return View(len(self.sources) - 1, tuple(tensor.shape), tensor.stride(), 0)

    # ------------------------------------------------------------------------------------------------ replaying

    def replay(self) -> None:
        """Give every saved tensor that is still wanted; the sources must be on the device."""
        self.num_seen, self._next_region = 0, 0
        for place, (view, requires_grad) in self._inputs.items():
            self._leaves[place] = self._seen(view).requires_grad_(requires_grad)
        args, kwargs = tree_unflatten(self._leaves, self._spec)
        for place in self._inputs:
            self._leaves[place] = None
        try:
            with (
                torch.enable_grad(),
                with_rng(self._rng, self.device),
                saved_tensors_hooks(weakly(self._collect), _refuse),
                watched(self._replay_call),
            ):
                self._forward(*args, **kwargs)
        except _Enough:
            return
        raise RuntimeError(
            f"a block saved {self._last + 1} tensors in its forward and {self.num_seen} when it ran again; it must do "
            "the same each time: use offload.activations.mode=keep"
        )

    def _seen(self, view: View) -> Tensor:
        flat = self.sources[view.of].flat
        assert flat is not None
        return view.see(flat).detach()

    def _collect(self, tensor: Tensor) -> None:
        number = self.num_seen
        self.num_seen += 1
        self._give(number, tensor)
        if number == self._last:
            raise _Enough

    def _give(self, number: int, tensor: Tensor) -> None:
        if number not in self.saved:
            return
        if (tensor.shape, tensor.dtype) != self._like[number]:
            raise RuntimeError(
                f"a block saved {tuple(self._like[number][0])} {self._like[number][1]} as its tensor {number}, and "
                f"{tuple(tensor.shape)} {tensor.dtype} when it ran again; it must do the same each time: use "
                "offload.activations.mode=keep"
            )
        if (saved := self.saved[number]()) is not None:
            saved.tensor = tensor.detach()

    def _replay_call(self, kind: str, inputs: Sequence[Tensor], call: Callable[[], Tensor]) -> Tensor:
        region = self.regions[self._next_region]
        self._next_region += 1
        if region.output is None or region.kind == "plain":
            return call()
        for number, view in region.aliases.items():
            self._give(number, view.see(inputs[view.of]))
        for number, view in region.stored.items():
            self._give(number, self._seen(view))
        self.num_seen = region.stop
        if region.stop > self._last:
            raise _Enough
        if region.rng is not None:
            set_rng_state(region.rng)
        out = self._seen(region.output)
        source = self.sources[region.output.of]
        if source.stored < source.numel:
            with torch.no_grad():  # .data: other results lie in the same buffer, and would count as written to
                product(inputs, out.data, source.stored // out.size(-1))
        return out.requires_grad_(region.requires_grad)


@dataclass(frozen=True)
class _Other:
    """What another's hook made of a saved tensor."""

    handle: Any
    unpack: Callable[[Any], Tensor]

    def get(self) -> Tensor:
        return self.unpack(self.handle)


def _unpack(saved: "Tensor | Saved | _Other") -> Tensor:
    """The hook of every tape: what is saved knows where it is, so that autograd's hooks hold no tape."""
    return saved if isinstance(saved, Tensor) else saved.get()


def _view_among(tensor: Tensor, bases: Sequence[Tensor]) -> View | None:
    """`tensor` as a view of the first of `bases` whose memory holds all of it."""
    pointer = tensor.untyped_storage().data_ptr()
    for number, base in enumerate(bases):
        if base.untyped_storage().data_ptr() == pointer and base.dtype == tensor.dtype:
            offset = tensor.storage_offset() - base.storage_offset()
            if 0 <= offset and offset + _extent(tensor) <= _extent(base):
                return View(number, tuple(tensor.shape), tensor.stride(), int(offset))
    return None


def _extent(tensor: Tensor) -> int:
    """Elements from its first to its last in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _is_dense(tensor: Tensor) -> bool:
    """Whether it fills its memory, in whatever order of dimensions, each element once."""
    expected = 1
    for step, n in sorted((step, n) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if step != expected:
            return False
        expected *= n
    return True


def _refuse(_: Any) -> Tensor:
    raise AssertionError("nothing goes backward through a replay")
