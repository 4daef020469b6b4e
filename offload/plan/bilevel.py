"""The memory of a whole step, planned on two levels.

[Note: two levels] A step of 80 layers allocates thousands of tensors, but what one layer allocates and frees within
its own forward, or its own backward, never meets what another does. Level one places those of one layer in an arena of
their own, once for all layers that are equal. Level two places the step: each arena is one request that lives for one
time step, beside what lives across layers: inputs, what is saved for the backward, swap buffers, gradients, gathered
weights, the head. A tensor's place is its arena's offset plus its offset there.
What this costs is known: `StepPlan.flat_bound_bytes` is a lower bound of any plan of the same step, level by level or
not, and `StepPlan.step.lower_bound_bytes` one of level two with these arenas.

Time steps of level two, for n layers: 0 the embedding, 1 to n the layers' forwards, n + 1 the head with its loss,
n + 2 to 2n + 1 the backwards in reverse, 2n + 2 the embedding's backward. What is swapped out lives until the next
layer's forward has ended, while it is copied, and again from the step before its backward: these are MEMO's two
rounding buffers. Whoever executes the plan must keep to that: a layer's forward waits for the copy-out of the layer two
before it, and a prefetch starts when the backward of the layer two after has ended.

Source: arXiv 2407.12117, memory planning (bi-level).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from offload.plan.fit import ALIGN, Placement, place
from offload.plan.record import Recorder
from offload.plan.requests import Request, load_bytes, rounded


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a layer wants. Equal layers share one solution of level one."""

    forward: tuple[Request, ...]
    """Made and freed in the forward; its operators are steps 0 to ``num_forward - 1``."""
    num_forward: int
    backward: tuple[Request, ...]
    num_backward: int
    saved: tuple[Request, ...] = ()
    """Made by the forward for the backward. The steps of the backward follow those of the forward: its first one is
    ``num_forward``."""
    gradients: tuple[Request, ...] = ()
    """Of the weights: made by the backward, and gone when the next layer's backward ends. Steps of the backward."""
    input_bytes: int
    """Of its input, which its backward reads too; as many for the gradient with respect to it."""
    weight_bytes: int = 0
    """Of weights that are gathered or streamed in one layer ahead; 0 if they stay where they are."""
    swap_input: bool = False
    swap_saved: frozenset[str] = frozenset()
    """Names of those of ``saved`` that leave the device between forward and backward."""

    def __post_init__(self) -> None:
        unknown = self.swap_saved - {r.name for r in self.saved}
        if unknown:
            raise ValueError(f"to be swapped: {sorted(unknown)}; what is saved: {[r.name for r in self.saved]}")

    def kept(self) -> "Layer":
        """This layer with nothing swapped."""
        return replace(self, swap_input=False, swap_saved=frozenset())


@dataclass(frozen=True, kw_only=True)
class Head:
    """The last unit, whose backward follows its forward at once."""

    inside: tuple[Request, ...]
    """All that it makes but the gradients; its operators are steps 0 to ``num_steps - 1``."""
    num_steps: int
    gradients: tuple[Request, ...] = ()
    input_bytes: int
    weight_bytes: int = 0


@dataclass(frozen=True)
class Arena:
    """Level one: where a layer's own tensors lie, relative to its block."""

    requests: tuple[Request, ...]
    placement: Placement


@dataclass(frozen=True)
class StepPlan:
    requests: tuple[Request, ...]
    """Of level two; their names are ``<layer>.<what>``."""
    step: Placement
    """Level two: where `requests` lie."""
    arenas: dict[str, Arena]
    """Level one by the name of the block in level two: ``<layer>.forward``, ``<layer>.backward``, ``head.inside``."""
    groups: dict[str, tuple[Request, ...]]
    """Tensors that live and die together and so are one request of level two, by its name: they lie side by side."""
    flat_bound_bytes: int
    """Most bytes wanted at one operator of the step: no plan of it takes less."""
    num_solved: int
    """Different arenas that level one had to place."""
    seconds: float

    def offsets(self) -> dict[str, int]:
        """Bytes from the start of the memory: requests of level two by name, and ``<request>/<tensor>`` within one."""
        found = dict(zip((r.name for r in self.requests), self.step.offsets, strict=True))
        for block, arena in self.arenas.items():
            for r, offset in zip(arena.requests, arena.placement.offsets, strict=True):
                found[f"{block}/{r.name}"] = found[block] + offset
        for group, requests in self.groups.items():
            offset = found[group]
            for r in requests:
                found[f"{group}/{r.name}"] = offset
                offset += rounded(r.size_bytes, self.step.align)
        return found


def plan_step(
    layers: Sequence[Layer],
    head: Head,
    *,
    keep_last: int = 2,
    align: int = ALIGN,
    time_limit_s: float = 10.0,
    gap: float = 0.01,
) -> StepPlan:
    """Both levels for `layers` in the order of their forward. The last `keep_last` are not swapped whatever they say:
    they would have to come back as they leave. `time_limit_s` is for both levels; `gap` as in `place`.

    ValueError without layers, or as `place` raises.
    """
    if not layers:
        raise ValueError("no layers: a step has one or more")
    start = time.monotonic()
    layers = [layer if i < len(layers) - keep_last else layer.kept() for i, layer in enumerate(layers)]
    solved: dict[tuple[Request, ...], Placement] = {}
    arenas: dict[str, Arena] = {}
    wanted = {f"{i}.{name}": part for i, x in enumerate(layers) for name, part in _arenas_of(x).items()}
    wanted["head.inside"] = head.inside
    for block, requests in wanted.items():
        if requests and requests not in solved:
            left_s = max(0.0, time_limit_s / 2 - (time.monotonic() - start))
            solved[requests] = place(requests, align=align, time_limit_s=left_s, gap=gap)
        if requests:
            arenas[block] = Arena(requests, solved[requests])
    arena_bytes = {block: arena.placement.size_bytes for block, arena in arenas.items()}
    requests, groups = _level_two(layers, head, arena_bytes, align)
    left_s = max(0.0, time_limit_s - (time.monotonic() - start))
    step = place(requests, align=align, time_limit_s=left_s, gap=gap)
    flat = load_bytes(flat_requests(layers, head), align)
    return StepPlan(requests, step, arenas, groups, flat, len(solved), time.monotonic() - start)


def _arenas_of(layer: Layer) -> dict[str, tuple[Request, ...]]:
    return {"forward": layer.forward, "backward": layer.backward}


def _level_two(
    layers: Sequence[Layer], head: Head, arena_bytes: dict[str, int], align: int
) -> tuple[tuple[Request, ...], dict[str, tuple[Request, ...]]]:
    """Its requests, and the tensors of those that hold several."""
    n = len(layers)
    found: list[Request] = []
    groups: dict[str, tuple[Request, ...]] = {}

    def want(name: str, owner: str, size_bytes: int, first: int, last: int) -> None:
        if size_bytes:
            found.append(Request(name, owner, size_bytes, first, last))

    def group(name: str, owner: str, requests: tuple[Request, ...], first: int, last: int) -> None:
        if requests:
            groups[name] = requests
            want(name, owner, sum(rounded(r.size_bytes, align) for r in requests), first, last)

    for i, layer in enumerate(layers):
        there, back = i + 1, 2 * n + 1 - i
        want(f"{i}.forward", "forward", arena_bytes.get(f"{i}.forward", 0), there, there)
        want(f"{i}.backward", "backward", arena_bytes.get(f"{i}.backward", 0), back, back)
        swapped = tuple(r for r in layer.saved if r.name in layer.swap_saved)
        group(f"{i}.saved", "saved", tuple(r for r in layer.saved if r not in swapped), there, back)
        group(f"{i}.swap_out", "swap", swapped, there, there + 1)
        group(f"{i}.swap_in", "swap", swapped, back - 1, back)
        if layer.swap_input:
            want(f"{i}.input_out", "swap", layer.input_bytes, there - 1, there + 1)
            want(f"{i}.input_in", "swap", layer.input_bytes, back - 1, back)
        else:
            want(f"{i}.input", "inputs", layer.input_bytes, there - 1, back)
        want(f"{i}.input_grad", "input gradients", layer.input_bytes, back, back + 1)
        group(f"{i}.gradients", "gradients", layer.gradients, back, back + 1)
        want(f"{i}.weights_there", "weights", layer.weight_bytes, there - 1, there)
        want(f"{i}.weights_back", "weights", layer.weight_bytes, back - 1, back)
    want("head.inside", "head", arena_bytes.get("head.inside", 0), n + 1, n + 1)
    want("head.input", "inputs", head.input_bytes, n, n + 1)
    want("head.input_grad", "input gradients", head.input_bytes, n + 1, n + 2)
    group("head.gradients", "gradients", head.gradients, n + 1, n + 2)
    want("head.weights", "weights", head.weight_bytes, n, n + 1)
    return tuple(found), groups


def flat_requests(layers: Sequence[Layer], head: Head) -> tuple[Request, ...]:
    """The same step with every tensor on its own and operators as time steps; the embedding is one step.

    What a layer saves lives from the operator that makes it to the last that reads it, not for whole layers. Swaps,
    inputs, gradients and weights end with a layer, as in level two.
    """
    n = len(layers)
    lengths = [1, *(x.num_forward for x in layers), head.num_steps, *(x.num_backward for x in reversed(layers)), 1]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    stops = [start - 1 for start in starts[1:]]  # last operator of each step of level two
    coarse, _ = _level_two(
        [replace(x, forward=(), backward=(), saved=(), swap_saved=frozenset(), gradients=()) for x in layers],
        replace(head, gradients=()),
        {},
        1,
    )
    found = [replace(r, first=starts[r.first], last=stops[r.last]) for r in coarse]

    def shift(requests: Sequence[Request], block: str, step: int, last: int | None = None) -> None:
        for r in requests:
            end = starts[step] + r.last if last is None else last
            found.append(replace(r, name=f"{block}/{r.name}", first=starts[step] + r.first, last=end))

    for i, layer in enumerate(layers):
        there, back = i + 1, 2 * n + 1 - i
        shift(layer.forward, f"{i}.forward", there)
        shift(layer.backward, f"{i}.backward", back)
        shift(layer.gradients, f"{i}.gradients", back, stops[back + 1])
        for r in layer.saved:
            first, last = starts[there] + r.first, starts[back] + r.last - layer.num_forward
            if r.name in layer.swap_saved:
                found.append(replace(r, name=f"{i}.swap_out/{r.name}", first=first, last=stops[there + 1]))
                found.append(replace(r, name=f"{i}.swap_in/{r.name}", first=starts[back - 1], last=last))
            else:
                found.append(replace(r, name=f"{i}.saved/{r.name}", first=first, last=last))
    shift(head.inside, "head.inside", n + 1)
    shift(head.gradients, "head.gradients", n + 1, stops[n + 2])
    return tuple(found)


def record_layer(module: nn.Module, x: Tensor, *others: object) -> Layer:
    """Run ``module(x, *others)`` forward and backward and say what it wants; nothing is kept or swapped yet.

    x: floating point, what the layer before gives; the module returns one tensor of the same size. Parameters get no
    ``.grad``. Enter a fake mode around it, with the module in it, and nothing is computed.
    """
    x = x.detach().requires_grad_()
    params = [p for p in module.parameters() if p.requires_grad]
    with Recorder(module) as recorder:
        with recorder.phase("forward"):
            y = module(x, *others)
        grad = torch.empty_like(y)  # the next layer's, which level two has as its input_grad
        output = (y, grad)
        with recorder.phase("backward"):
            grads = torch.autograd.grad(y, [x, *params], grad)
        made = recorder.requests(without=(*output, grads[0]))
        results = {r.name for r in map(recorder.request_of, grads[1:]) if r is not None}
    there, back = recorder.phases["forward"], recorder.phases["backward"]
    return Layer(
        forward=tuple(r for r in made if r.last < there.stop),
        num_forward=len(there),
        backward=_since(back, [r for r in made if r.first >= back.start and r.name not in results]),
        num_backward=len(back),
        saved=tuple(
            replace(r, last=len(there) + max(0, r.last - back.start)) for r in made if r.first < there.stop <= r.last
        ),
        gradients=_since(back, [r for r in made if r.name in results]),
        input_bytes=x.untyped_storage().nbytes(),
    )


def record_head(module: nn.Module, x: Tensor, *others: object) -> Head:
    """As `record_layer`, for a module that returns a loss (0-dim)."""
    x = x.detach().requires_grad_()
    params = [p for p in module.parameters() if p.requires_grad]
    with Recorder(module) as recorder, recorder.phase("head"):
        grads = torch.autograd.grad(module(x, *others), [x, *params])
        made = recorder.requests(without=(grads[0],))
        results = {r.name for r in map(recorder.request_of, grads[1:]) if r is not None}
    return Head(
        inside=tuple(r for r in made if r.name not in results),
        num_steps=recorder.num_steps,
        gradients=tuple(r for r in made if r.name in results),
        input_bytes=x.untyped_storage().nbytes(),
    )


def _since(phase: range, requests: Sequence[Request]) -> tuple[Request, ...]:
    return tuple(replace(r, first=r.first - phase.start, last=r.last - phase.start) for r in requests)
