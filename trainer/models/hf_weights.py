"""Where a Hugging Face model's first weights come from: ranges of safetensors files, or the model's own random rule."""

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from offload.state import MASTER
from trainer.models.random_init import stable_seed


class SafetensorsRead:
    """An `offload.state.Read` of a folder's ``*.safetensors``; only the rows that a range touches are read."""

    def __init__(
        self, folder: Path, shapes: dict[str, tuple[int, ...]], hf_names: dict[str, list[str]], base_prefix: str
    ) -> None:
        """hf_names: for each of our names those it may have in the files; some files leave out `base_prefix`.

        ValueError where a tensor is not there or has another shape.
        """
        self._device = torch.device("cpu")
        self._shapes = shapes
        self._files = {path: safe_open(path, framework="pt") for path in _paths(folder)}
        where = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118 not a dict
        self._places: dict[str, tuple[Path, str]] = {}
        for name in shapes:
            for hf_name in hf_names[name]:
                for alias in (hf_name, hf_name.removeprefix(f"{base_prefix}."), f"{base_prefix}.{hf_name}"):
                    if alias in where:
                        self._places.setdefault(name, (where[alias], alias))
        self._check(folder, hf_names, where)

    def on(self, device: torch.device) -> "SafetensorsRead":
        """The same files, their tensors put on `device`."""
        self._device = device
        return self

    def __call__(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor: 1-D fp32."""
        if kind != MASTER or name not in self._places:
            raise KeyError(f"no {kind} of {name} in a folder of Hugging Face weights")
        rows = self._slice(name)
        shape = self._shapes[name]
        if not shape:
            scalar: Tensor = rows[...].reshape(1)[start:stop]
            return scalar.to(self._device, torch.float32)
        row_size = max(prod(shape[1:]), 1)
        first = start // row_size
        values: Tensor = rows[first : -(-stop // row_size)].flatten()
        values = values[start - first * row_size : stop - first * row_size]
        return values.to(self._device, torch.float32)

    def _slice(self, name: str) -> Any:
        path, hf_name = self._places[name]
        return self._files[path].get_slice(hf_name)

    def _check(self, folder: Path, hf_names: dict[str, list[str]], where: dict[str, Path]) -> None:
        missing = [hf_names[name][0] for name in self._shapes if name not in self._places]
        if missing:
            raise ValueError(
                f"model.path={folder}: {len(missing)} of the model's {len(self._shapes)} tensors are not in its files: "
                f"{', '.join(missing[:5])}. The files have, for example, {', '.join(sorted(where)[:5])}. "
                f"Tensors that transformers renames or merges as it loads them are not read; "
                f"model.from_scratch=true starts from random weights."
            )
        for name, shape in self._shapes.items():
            found = tuple(self._slice(name).get_shape())
            if found != shape:
                raise ValueError(
                    f"model.path={folder}: {self._places[name][1]} has shape {found} in the files and {shape} in the "
                    f"model; take back the model.overrides that change it, or set model.from_scratch=true"
                )


def _paths(folder: Path) -> list[Path]:
    """The files that hold the weights, by the index if there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"model.path={folder}: {index.name} names {', '.join(absent[:5])}, which are not there")
        return [folder / name for name in names]
    if not (found := sorted(folder.glob("*.safetensors"))):
        raise ValueError(
            f"model.path={folder}: there are no *.safetensors. Save the weights in that format, "
            f"or set model.from_scratch=true"
        )
    return found


class InitRuleRead:
    """An `offload.state.Read` of random weights by the model's ``_init_weights``, one parameter at a time.

    The rule works on modules, so a parameter is drawn by giving it alone memory and running the rule on its module and
    on all that contain it, innermost first as in `transformers`: on parameters on ``meta`` it does nothing.
    """

    def __init__(
        self, causal_lm: transformers.PreTrainedModel, hf_names: dict[str, list[str]], seed: int, device: torch.device
    ) -> None:
        self._causal_lm, self._hf_names, self._seed, self._device = causal_lm, hf_names, seed, device
        self._last: tuple[str, Tensor] | None = None

    def __call__(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        if kind != MASTER or name not in self._hf_names:
            raise KeyError(f"no {kind} of {name}: only weights of the model's parameters are drawn")
        if self._last is None or self._last[0] != name:  # a parameter's ranges are often read one after another
            self._last = name, self._draw(self._hf_names[name][0])
        return self._last[1][start:stop]

    def _draw(self, hf_name: str) -> Tensor:
        """The whole parameter, flattened, fp32."""
        path, _, leaf = hf_name.rpartition(".")
        owner = self._causal_lm.get_submodule(path)
        on_meta = getattr(owner, leaf)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(stable_seed(self._seed, hf_name))
            values = nn.Parameter(torch.empty(on_meta.shape, device=self._device))
            setattr(owner, leaf, values)
            for module, rule in self._enclosing(path):
                rule._init_weights(module)
            setattr(owner, leaf, on_meta)
        return values.detach().flatten()

    def _enclosing(self, path: str) -> list[tuple[nn.Module, transformers.PreTrainedModel]]:
        """The modules along `path`, innermost first, each with the model whose rule is valid for it."""
        module: nn.Module = self._causal_lm
        found = [(module, self._causal_lm)]
        for part in path.split("."):
            module = module.get_submodule(part)
            found.append((module, module if isinstance(module, transformers.PreTrainedModel) else found[-1][1]))
        return found[::-1]
