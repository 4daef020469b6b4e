"""How a model becomes units: whose parameters are whose, without memory of their own yet, in which flat buffers, and
how blocks run."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel.mesh import Mesh
from parallel.placement import Placement
from parallel.transport import Transport
from parallel.unit import Flat, Named, TrainableFlat, Unit, without_memory


def move_without_memory(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace each parameter by one without memory, in the dtype and on the device that it computes with; ties stay."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False, remove_duplicate=False):
            if old not in new:
                new[old] = nn.Parameter(without_memory(old.shape, dtype, device), old.requires_grad)
            setattr(module, name, new[old])


def lay_out_buffers(model: nn.Module) -> None:
    """Replace each persistent buffer that is not contiguous (expanded, transposed) by a copy that is; ties stay.

    They are broadcast and checkpointed as ranges, and gloo writes past the end of one that a stride of 0 makes larger.
    """
    persistent, new = model.state_dict(keep_vars=True), dict[torch.Tensor, torch.Tensor]()
    for name, old in model.named_buffers(remove_duplicate=False):
        if name in persistent and not old.is_contiguous():
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, new.setdefault(old, old.contiguous()))


def cut_units(model: nn.Module, units: Sequence[nn.Module]) -> tuple[list[tuple[str, nn.Module, Named]], Named]:
    """Each unit's own parameters, and the root's: those of no unit or of several. Names are the model's."""
    module_names = {module: name for name, module in model.named_modules()}
    users: dict[nn.Parameter, set[nn.Module]] = {parameter: set() for parameter in model.parameters()}
    inside: set[nn.Module] = set()
    for unit in units:
        if unit not in module_names:
            raise ValueError(f"unit {type(unit).__name__} is not a submodule of the model")
        if unit in inside:
            raise ValueError(f"unit {module_names[unit]} lies inside another unit")
        inside.update(unit.modules())
        for parameter in unit.parameters():
            users[parameter].add(unit)
    for module in model.modules():
        if module not in inside:
            for parameter in module.parameters(recurse=False):
                users[parameter].add(module)
    own: dict[nn.Module, list[tuple[str, nn.Parameter]]] = {unit: [] for unit in units}
    root: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        first, *others = users[parameter]
        (root if others or first not in own else own[first]).append((name, parameter))
    return [(module_names[unit], unit, named) for unit, named in own.items() if named], root


def make_unit(
    name: str,
    module: nn.Module,
    named: Named,
    *,
    mesh: Mesh,
    placement: Placement,
    dtype: torch.dtype,
    device: torch.device,
    reduce_dtype: torch.dtype,
    transport: Transport,
) -> Unit:
    """A unit and its flat buffers: of what trains and may be quantized, of what else trains, of what is frozen."""
    named = sorted(named, key=lambda item: item[1].ndim < 2)  # what decays side by side: fewer, longer runs
    train = [(name, p) for name, p in named if p.requires_grad]
    frozen = [(name, p) for name, p in named if not p.requires_grad]
    quantized = [(name, p) for name, p in train if transport.allows(name, p.ndim)]
    exact = [(name, p) for name, p in train if not transport.allows(name, p.ndim)]
    trainable = [
        TrainableFlat(part, mesh, placement, dtype, device, reduce_dtype=reduce_dtype, transport=through)
        for part, through in ((quantized, transport), (exact, None)) if part
    ]  # fmt: skip
    return Unit(name, module, trainable, Flat(frozen, mesh, placement, dtype, device) if frozen else None)


def wrap_blocks(*, recompute: Sequence[nn.Module], compile: Sequence[nn.Module]) -> None:
    """Compile and recompute the forward of these modules, inside the hooks that gather their parameters.

    What is recomputed is the compiled block.
    """
    for module in compile:
        module.forward = torch.compile(module.forward)
    for module in recompute:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
