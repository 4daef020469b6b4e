"""Who holds the device's memory, and a picture of one step: ``memory.json`` and ``memory.png`` of a run.

At the border between two units what was made on the way is free again. So what is held there and belongs to nobody else
is activations, and what the peak between two borders is above both of them is the workspace of the unit that ran.

On a GPU PyTorch's allocator is asked. On CPU `offload.plan.Recorder` counts what the step's operators make; compiled
code is not seen, so a run that compiles its blocks there shows the owners alone.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from offload.plan import Recorder
from parallel.engine import Engine

ACTIVATIONS, WORKSPACE, OTHER = "activations", "workspace", "other"
COLORS = {
    "parameters": "#2f6fb3",
    "optimizer states": "#7aa6d8",
    "communication buffers": "#b7cde8",
    "gradients": "#4f9d69",
    ACTIVATIONS: "#d9622b",
    "swapped activations": "#f0a57f",
    WORKSPACE: "#c9b458",
    OTHER: "#9aa5b1",
}


def owners(engine: Engine, device: torch.device) -> dict[str, int]:
    """Bytes on the device now, by owner, without the activations that autograd holds."""
    state = engine.state_bytes()
    return {
        "parameters": state["parameters"],
        "optimizer states": state["master"] + state["optimizer"] + state.get("residuals", 0),
        "communication buffers": state["buffers"],
        "gradients": state.get("gradients", 0),
        **engine.passing_bytes(),
    }


@dataclass
class Picture:
    """One step, as it is watched: `watch` around it."""

    engine: Engine
    units: Sequence[nn.Module]
    """In the order they run."""
    device: torch.device
    counted: bool
    """On CPU: whether operators are seen, which they are not where blocks are compiled."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """At each border: what begins ``at`` it, bytes by ``owners``, and ``peak`` since the border before, in all."""

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Fills `points`; the step is the same to the bit."""
        self.points.clear()
        self.step = step
        with ExitStack() as stack:
            self._meter = stack.enter_context(_meter(self.device, self.counted))
            self._other = self._held() - sum(self._owners().values()) if self.device.type == "cuda" else 0
            self._base = 0 if self.device.type == "cuda" else sum(self._owners().values())
            self._mark("step begins")
            for number, unit in enumerate(self.units):
                name = f"{type(unit).__name__} {number}"
                before = unit.register_forward_pre_hook(self._begins(f"{name} forward"))
                after = unit.register_forward_hook(self._comes_back(f"{name} backward"))
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield
            self._mark("step ends")

    def _begins(self, at: str) -> Callable[..., None]:
        return lambda *_: self._mark(at)

    def _comes_back(self, at: str) -> Callable[..., None]:
        def ran(module: nn.Module, args: Any, output: Any) -> None:
            moving = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            if moving and torch.is_grad_enabled():
                register_multi_grad_hook(moving, lambda _: self._mark(at), mode="any")

        return ran

    def _owners(self) -> dict[str, int]:
        return owners(self.engine, self.device)

    def _held(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else self._meter.held_bytes

    def _mark(self, at: str) -> None:
        known, held = self._owners(), self._held()
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            held, peak = self._base + held, self._base + self._meter.peak_bytes
            self._meter.peak_bytes = self._meter.held_bytes
        activations = max(0, held - self._other - sum(known.values()))
        owned = {**known, ACTIVATIONS: activations, OTHER: max(0, self._other)}
        before = sum(self.points[-1]["owners"].values()) if self.points else 0
        level = sum(owned.values())
        workspace = max(0, peak - max(before, level)) if self.points else 0
        self.points.append({"at": at, "owners": owned, WORKSPACE: workspace, "peak": max(level + workspace, before)})

    def record(self) -> dict[str, Any]:
        """The whole, for JSON: bytes."""
        most = max(self.points, key=lambda point: point["peak"])
        found: dict[str, Any] = {"step": self.step, "device": str(self.device), "peak": most, "points": self.points}
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats(self.device)
            keys = ("allocated_bytes.all.current", "reserved_bytes.all.peak", "num_alloc_retries", "num_ooms")
            found["torch"] = {key: stats.get(key, 0) for key in keys}
        return found


def _meter(device: torch.device, counted: bool) -> AbstractContextManager[Recorder]:
    recorder = Recorder()
    if device.type == "cuda" or not counted:
        return _Idle(recorder)
    return recorder


class _Idle(AbstractContextManager[Recorder]):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> Recorder:
        return self._recorder

    def __exit__(self, *_: Any) -> None: ...


def draw(record: Path, png: Path, title: str) -> None:
    """Draw a `Picture.record` in the file `record` into `png` (1600 x 900 pixels), replacing it at once."""
    from matplotlib.figure import Figure

    found = json.loads(record.read_text())
    points, gib = found["points"], 2**30
    scale, unit = (gib, "GiB") if found["peak"]["peak"] > 2**28 else (2**20, "MiB")
    names = [name for name in COLORS if name != WORKSPACE and any(p["owners"].get(name) for p in points)]
    rows = [[p["owners"].get(name, 0) / scale for p in points] for name in names]
    rows.append([p[WORKSPACE] / scale for p in points])
    figure = Figure(figsize=(8, 4.5), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    labels = [*names, WORKSPACE]
    axes.stackplot(
        range(len(points)), rows, labels=labels, colors=[COLORS[name] for name in labels], step="pre", linewidth=0
    )
    most = max(range(len(points)), key=lambda i: points[i]["peak"])
    axes.annotate(
        f"{points[most]['peak'] / scale:.1f} {unit} before {points[most]['at']}",
        (most, sum(row[most] for row in rows)),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
    if reserved := found.get("torch", {}).get("reserved_bytes.all.peak"):
        axes.axhline(reserved / scale, color="#1f2933", linewidth=0.8, linestyle="--", label="reserved by PyTorch")
    turn = next((i for i, p in enumerate(points) if p["at"].endswith("backward")), None)
    if turn is not None:
        axes.axvline(turn, color="#6b7785", linewidth=0.8, linestyle=":")
        axes.text(turn, 0, " backward", va="bottom", fontsize=8, color="white")
    axes.margins(x=0, y=0.15)
    axes.set_title(f"{title}: memory of step {found['step']} on {found['device']}", loc="left", fontsize=11)
    axes.set_xlabel("units of the model, forward and backward")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper left")
    new = png.with_name(png.name + ".new")
    figure.savefig(new, format="png")
    os.replace(new, png)
