"""A machine as the cost model sees it: its links, its memory, and how fast a rank computes.

Rates are what is reached, not what is printed on the box: `benchmarks/links.py` measures them, and the presets take a
stated share of the nominal figures. Bandwidths are bytes/s in one direction, links are full duplex.

[Note: shared links] The outermost link of a node is its network card, which all ranks of the node use at once: its
bandwidth is divided by the ranks below it. An NVLink port belongs to one rank. `Link.shared` says which.

[Note: shared cores] Where ranks compute on CPUs, what crosses a link is copied by the same cores: a transfer takes
`Link.core` of them, compute takes all. What wants more than there is gets it as a fair scheduler shares it: nobody less
than an equal part, unless it wants less. On GPUs NCCL's kernels take processors that products have not: 0.2 of them on
four H200, where a step took longer by 17 of the 73 to 79 ms that they ran (docs/multi-gpu.md). Presets of GPUs that
were not measured have 0: transfers are free there.

[Note: late neighbours] TCP does not share a link evenly among the ranks of a node: in an all-gather or all-to-all over
it one pair is through before the others. Nobody loses by that where each goes on to its next transfer over the same
link, which so stays full; but who then has to do with its neighbours waits for the last of them. An all-reduce sends in
small pieces and keeps its ranks in step.
"""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

COLLECTIVES = ("all_gather", "all_to_all", "all_reduce")
"""What crosses a link. A reduce-scatter counts as an all-to-all: it moves the same bytes."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A straight line through measured times of one collective: ``start_s + steps * latency + bytes / bandwidth``."""

    bandwidth: float
    """Bytes/s out of a rank while all ranks take part."""
    latency: float
    """Seconds a step: a ring of n ranks takes n - 1, an all-reduce 2 (n - 1)."""
    start_s: float = 0.0
    """Seconds a collective takes whatever it moves and over however many ranks."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Quantizing or dequantizing a message: ``call_s + bytes / rate``."""

    rate: float
    """Bytes/s read and written."""
    call_s: float = 0.0
    """Seconds that it takes beside its bytes, of however many chunks the message is."""


PACKINGS = ("quantize_int8", "dequantize_int8", "quantize_int4", "dequantize_int4")


@dataclass(frozen=True, kw_only=True)
class Link:
    name: str
    size: int | None = None
    """How many members one group of this level has where the machine is full; None: any number (the outermost)."""
    bandwidth: float
    """Bytes/s out of one member of the level: a node's where `shared`, else a rank's."""
    latency: float = 0.0
    """Seconds a step of a collective."""
    shared: bool = False
    """Whether all ranks below a member share its bandwidth, see [Note: shared links]."""
    rank_bandwidth: float | None = None
    """The most that one rank gets of a shared link where it is alone, for example one of several cards. None: all."""
    fits: Mapping[str, Fit] = field(default_factory=dict)
    """Measured per collective, with all ranks of all groups taking part: a rank's share, where the link is shared."""
    core: float = 0.0
    """Part of a rank's cores, or of a GPU's processors, that a transfer takes at full speed, see [Note: shared cores].
    0 to 1."""
    skew: float = 0.0
    """How much later than this rank its neighbours are through a collective over a shared link, as a part of the
    seconds that it takes, see [Note: late neighbours]."""
    burst: float = 0.0
    """Bytes that a member may send at once after it was silent, where the link is shaped (a token bucket)."""

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.latency < 0 or (self.rank_bandwidth is not None and self.rank_bandwidth <= 0):
            raise ValueError(
                f"machine.links.{self.name}: bandwidth={self.bandwidth} must be above 0 bytes/s and "
                f"latency={self.latency} at least 0 s"
            )
        if not 0 <= self.core <= 1:
            raise ValueError(f"machine.links.{self.name}.core={self.core}: a part of the cores is from 0 to 1")
        if self.skew < 0 or self.burst < 0:
            raise ValueError(f"machine.links.{self.name}: skew={self.skew} and burst={self.burst} must be at least 0")
        if self.size is not None and self.size < 1:
            raise ValueError(f"machine.links.{self.name}.size={self.size}: a level has at least one member")
        if unknown := set(self.fits) - set(COLLECTIVES):
            raise ValueError(f"machine.links.{self.name}.fits has {sorted(unknown)}: choose from {list(COLLECTIVES)}")

    def rate(self, kind: str, ranks_below: int) -> float:
        """Bytes/s that each rank gets while all of them use the link for a collective of this kind."""
        if kind in self.fits:
            return self.fits[kind].bandwidth
        fair = self.bandwidth / ranks_below if self.shared else self.bandwidth
        return fair if self.rank_bandwidth is None else min(fair, self.rank_bandwidth)

    @property
    def alone(self) -> float:
        """Bytes/s that a rank gets while no other uses its link."""
        return self.bandwidth if self.rank_bandwidth is None else min(self.bandwidth, self.rank_bandwidth)

    def wait_s(self, kind: str, steps: int) -> float:
        """Seconds that a collective of so many steps takes beside its bytes."""
        fit = self.fits.get(kind)
        return fit.start_s + steps * fit.latency if fit else steps * self.latency


@dataclass(frozen=True, kw_only=True)
class Machine:
    name: str
    links: tuple[Link, ...] = ()
    """Slowest first, as in `parallel.mesh.Mesh`."""
    compute: float
    """FLOP/s that a rank reaches in the model's products."""
    memory_rate: float
    """Bytes/s read and written in the memory that a rank computes in."""
    memory: Mapping[str, float] = field(default_factory=dict)
    """Bytes a rank has of each tier: ``gpu`` (or, without one, ``host``), ``host``, ``nvme``."""
    packing: Mapping[str, Packing] = field(default_factory=dict)
    """By `PACKINGS`. What is not there goes at `memory_rate`, as a GPU's kernels do."""
    away: Mapping[str, float] = field(default_factory=dict)
    """Rates of one rank while states are away from the device, by the names of `offload.cost.Rates`. Those that are not
    there are taken from one that was measured, `parallel.planning.away.MEASURED`."""
    backend: str = "nccl"
    """``nccl``: chains run on side streams; ``gloo``: the host moves them on, see `parallel.collectives`."""
    unit_s: float = 0.0
    """Seconds that a unit's forward, and its backward, take beside its FLOPs."""
    issue_s: float = 0.0
    """Seconds of the thread that computes, to issue a collective and take its result: gloo's, whose latency is without
    them. On CUDA the host runs ahead."""
    step_s: float = 0.0
    """Seconds that a step takes beside its units: the loop, the optimizer's launches."""
    jitter: float = 0.0
    """Standard deviation of a rank's compute time, as a fraction; a step waits for the slowest rank."""

    def __post_init__(self) -> None:
        for name in ("compute", "memory_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"machine.{name}={getattr(self, name)}: must be above 0")
        if self.backend not in ("nccl", "gloo"):
            raise ValueError(f"machine.backend={self.backend!r}: choose nccl or gloo")
        if unknown := set(self.packing) - set(PACKINGS):
            raise ValueError(f"machine.packing has {sorted(unknown)}: choose from {list(PACKINGS)}")
        names = [link.name for link in self.links]
        if len(set(names)) != len(names):
            raise ValueError(f"machine.links have the names {names}: each must be there once")

    @property
    def tier(self) -> str:
        """Where a rank computes."""
        return "gpu" if "gpu" in self.memory else "host"

    def link(self, name: str) -> Link:
        """The link of a level. ValueError where the machine has none of that name."""
        for link in self.links:
            if link.name == name:
                return link
        names = ", ".join(link.name for link in self.links) or "none"
        raise ValueError(
            f"parallel.levels has {name!r}, but machine={self.name} has the links {names}; name the levels like the "
            f"links, or choose another machine="
        )

    def levels(self, world: int) -> dict[str, int]:
        """How `world` ranks lie on this machine, slowest level first, filled from the innermost."""
        sizes: dict[str, int] = {}
        rest = world
        for link in reversed(self.links):
            size = rest if link.size is None else math.gcd(rest, link.size)
            sizes[link.name] = size
            rest //= size
        if rest != 1:
            fits = math.prod(link.size or 1 for link in self.links)
            raise ValueError(
                f"launch.workers={world} do not fit on machine={self.name}, which has {fits} a node and no link "
                f"between nodes; lower launch.workers or choose another machine="
            )
        return {link.name: sizes[link.name] for link in self.links}

    def ranks_of_node(self, levels: Mapping[str, int]) -> int:
        """How many of the ranks in `levels` are on one node: those that no link between nodes is between."""
        inside = {link.name for link in self.links if link.size is not None}
        return math.prod(size for name, size in levels.items() if name in inside)

    def slowest_of(self, world: int) -> float:
        """How much longer the slowest of `world` ranks computes than the mean one: 1 + jitter * E[max of n normals]."""
        return 1 + self.jitter * expected_max(world)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON or YAML; `of` reads them back."""
        mapping = asdict(self)
        links = mapping.pop("links")
        return mapping | {"links": {link.pop("name"): link for link in links}}

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> "Machine":
        """From plain values: ``links`` by name, slowest first. ``preset`` names one to start from.

        ValueError for keys that there are not.
        """
        values = dict(mapping)
        base = preset(str(values.pop("preset"))) if "preset" in values else None
        _check_keys(values, cls, "machine")
        if "links" in values:
            values["links"] = tuple(_link(name, link) for name, link in values["links"].items())
        if "packing" in values:
            for name, packing in values["packing"].items():
                _check_keys(packing, Packing, f"machine.packing.{name}")
            values["packing"] = {name: Packing(**packing) for name, packing in values["packing"].items()}
        if base is not None:
            return replace(base, **values)
        if missing := {"name", "compute", "memory_rate"} - values.keys():
            raise ValueError(f"machine needs {', '.join(sorted(missing))}; or preset=<name> to start from")
        return cls(**values)


def load_machine(name: str) -> Machine:
    """A preset by its name, or a machine in a ``.json`` or ``.yaml`` file by its path."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name).expanduser()
    if path.suffix not in (".json", ".yaml", ".yml"):
        return preset(name)
    if not path.is_file():
        raise ValueError(f"machine={name}: there is no such file; benchmarks/links.py writes one")
    import yaml

    try:
        mapping = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"machine={name} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"machine={name}: the file must hold a mapping, it holds {type(mapping).__name__}")
    return Machine.of(mapping.get("machine", mapping))


def preset(name: str) -> Machine:
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"machine={name}: choose one of {', '.join(PRESETS)}, or a .json or .yaml file{hint}")
    return PRESETS[name]


def expected_max(count: int) -> float:
    """The mean of the largest of `count` standard normal samples (Blom 1958, within 1% from 2 on)."""
    from statistics import NormalDist

    return 0.0 if count < 2 else NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def _link(name: str, values: Mapping[str, Any]) -> Link:
    _check_keys(values, Link, f"machine.links.{name}")
    for measured, fit in values.get("fits", {}).items():
        _check_keys(fit, Fit, f"machine.links.{name}.fits.{measured}")
    fits = {kind: Fit(**fit) for kind, fit in values.get("fits", {}).items()}
    return Link(name=name, **{**values, "fits": fits})


_NUMBERS = (float, float | None, int | None)
"""The types of fields that are numbers."""


def _check_keys(values: Mapping[str, Any], kind: type, where: str) -> None:
    known = {item.name: item.type for item in fields(kind)}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
            raise ValueError(f"{where} has no {key!r}{hint}")
        numbers = {key: value} if known[key] in _NUMBERS else {}
        if known[key] == Mapping[str, float]:
            numbers = {f"{key}.{name}": number for name, number in value.items()}
        for name, number in numbers.items():
            if not isinstance(number, int | float | None):
                raise ValueError(f"{where}.{name}={number!r} is no number; in YAML 4.0e+14 is one, 4e14 is a word")


def _gpus(count: int, bandwidth: float, latency: float = 5e-6, core: float = 0.0) -> Link:
    return Link(name="gpu", size=count, bandwidth=bandwidth, latency=latency, core=core)


def _network(bandwidth: float, latency: float = 10e-6, core: float = 0.0) -> Link:
    return Link(name="node", bandwidth=bandwidth, latency=latency, shared=True, core=core)


_ALL = (
    # arXiv 2501.04266, fig. 2: 200 GB/s in a pair of dies, 50-100 GB/s between the pairs, 100 GB/s a node outward
    Machine(
        name="frontier", compute=70e12, memory_rate=1.3e12, memory={"gpu": 64e9, "host": 64e9},
        links=(
            _network(0.8 * 100e9),
            Link(name="gpu", size=4, bandwidth=0.8 * 50e9, latency=8e-6),
            Link(name="die", size=2, bandwidth=0.8 * 200e9, latency=8e-6),
        ),
    ),
    # NVLink 450 GB/s and 8 x 400 Gb/s, 80% of each; 700 TFLOP/s in large bf16 products, 550 in a step
    Machine(
        name="dgx-h100", compute=550e12, memory_rate=2.8e12, memory={"gpu": 80e9, "host": 256e9},
        links=(_network(0.8 * 400e9, core=0.2), _gpus(8, 0.8 * 450e9, core=0.2)),
    ),
    # NVLink 300 GB/s and 8 x 200 Gb/s, 80% of each
    Machine(
        name="dgx-a100", compute=220e12, memory_rate=1.6e12, memory={"gpu": 80e9, "host": 256e9},
        links=(_network(0.8 * 200e9), _gpus(8, 0.8 * 300e9)),
    ),
    # 16 V100 on NVSwitch (150 GB/s) and one card of 100 Gb/s a node, 80% of each
    Machine(
        name="v100-100g", compute=60e12, memory_rate=0.75e12, memory={"gpu": 32e9, "host": 90e9},
        links=(_network(0.8 * 12.5e9), _gpus(16, 0.8 * 150e9)),
    ),
    # 8 GPUs on PCIe 4 through the host, Ethernet between the boxes
    Machine(
        name="ethernet-100g", compute=120e12, memory_rate=0.8e12, memory={"gpu": 24e9, "host": 64e9},
        links=(_network(0.85 * 12.5e9, 30e-6), _gpus(8, 10e9, 15e-6)),
    ),
    Machine(
        name="ethernet-25g", compute=120e12, memory_rate=0.8e12, memory={"gpu": 24e9, "host": 64e9},
        links=(_network(0.85 * 3.125e9, 30e-6), _gpus(8, 10e9, 15e-6)),
    ),
    # one H100 and nothing to talk to
    Machine(name="single", compute=550e12, memory_rate=2.8e12, memory={"gpu": 80e9, "host": 256e9}),
)  # fmt: skip
PRESETS: dict[str, Machine] = {machine.name: machine for machine in _ALL}
