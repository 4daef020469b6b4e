"""What a piece of a step allocates, and when it is freed.

Every operator that reaches the dispatcher is one time step. A storage that an operator returns and that was not there
before starts its life at that step, and ends it at the last step begun before the storage was freed: autograd's saved
tensors, views and in-place results are counted by the memory that they keep, not by name. Under fake tensors nothing
is computed and nothing is allocated, so the largest model's step is recorded on any machine.

Not seen: what a kernel takes for itself and gives back before it returns (workspaces), a storage that is resized after
it was made, and what compiled code allocates; record the module before it is compiled. One thread: the backward must
run on the thread that records, as it does on the CPU.

Source: arXiv 2407.12117, section on the job profiler and the memory planner; the idea of a storage's life from
torch.distributed._tools.mem_tracker.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from offload.plan.requests import Request


class Recorder(TorchDispatchMode):
    """Records while it is entered::

        with FakeTensorMode(), Recorder(block) as recorder:
            with recorder.phase("forward"):
                y = block(x)
            with recorder.phase("backward"):
                y.backward(grad)
        place(recorder.requests())

    A request is owned by the submodule of `module` whose forward made it, ``module/outer.inner``, else by the phase.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_steps = 0
        self.held_bytes = 0
        """Of what was made and is not freed."""
        self.peak_bytes = 0
        """The most of it so far; may be set back."""
        self.phases: dict[str, range] = {}
        """The time steps of each phase."""
        self._module = module
        self._within: list[str] = []
        self._hooks: list[Any] = []
        self._made: list[tuple[str, str, int, int]] = []
        """Name, owner, bytes, first step."""
        self._last: dict[int, int] = {}
        self._alive: dict[int, int | None] = {}
        """By id of a storage, which is unique while it lives: its place in `_made`, None if it was there before."""

    def __enter__(self) -> "Recorder":
        for name, module in self._module.named_modules() if self._module is not None else ():
            self._hooks += self._follow(module, name)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names the time steps within. ValueError for a name used before."""
        if name in self.phases:
            raise ValueError(f"phase {name!r} was recorded before; give each its own name")
        start = self.num_steps
        self._within.append(name)
        yield
        self._within.pop()
        self.phases[name] = range(start, self.num_steps)

    def requests(self, *, without: tuple[Tensor, ...] = ()) -> tuple[Request, ...]:
        """What was made, in order; what still lives ends with the last step. Leaves out the memory of `without`."""
        left_out = {self._alive.get(id(t.untyped_storage())) for t in without}
        end = self.num_steps - 1
        return tuple(
            Request(name, owner, size, first, self._last.get(i, end))
            for i, (name, owner, size, first) in enumerate(self._made)
            if i not in left_out
        )

    def request_of(self, tensor: Tensor) -> Request | None:
        """That of the memory of `tensor`, or None if it was not made while recording."""
        i = self._alive.get(id(tensor.untyped_storage()))
        return None if i is None else Request(*self._made[i], self.num_steps - 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if id(storage) not in self._alive:
                self._watch(storage, None)
        step = self.num_steps
        self.num_steps += 1
        result = func(*args, **kwargs)
        for number, tensor in enumerate(_tensors(result)):
            storage = tensor.untyped_storage()
            if id(storage) not in self._alive and storage.nbytes():
                self._watch(storage, len(self._made))
                owner = "/".join(self._within) or "step"
                name = f"{step}:{func}" + (f"[{number}]" if number else "")
                self._made.append((name, owner, storage.nbytes(), step))
                self.held_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return result

    def _watch(self, storage: torch.UntypedStorage, place: int | None) -> None:
        self._alive[id(storage)] = place
        weakref.finalize(storage, self._freed, id(storage), place).atexit = False

    def _freed(self, identity: int, place: int | None) -> None:
        del self._alive[identity]
        if place is not None:
            self.held_bytes -= self._made[place][2]
            # A tensor freed by the operator that made it was still there during that operator.
            self._last[place] = max(self.num_steps - 1, self._made[place][3])

    def _follow(self, module: nn.Module, name: str) -> list[Any]:
        # Only forward hooks: backward hooks put nodes into the graph, which change what is saved.
        def enter(*_: Any) -> None:
            self._within.append(name.rpartition(".")[2] or "module")

        def leave(*_: Any) -> None:
            self._within.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
