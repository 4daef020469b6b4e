"""Options of the engine: where state is partitioned, and how it is updated."""

import re
from dataclasses import dataclass, field, replace

PLACEMENTS = ("ddp", "zero1", "zero2", "zero3", "hsdp", "hfsdp", "topo", "free", "auto")
DTYPES = ("fp32", "bf16")
QUANTIZE = ("none", "outer", "all", "auto")
WEIGHTS_FORMATS = ("exact", "int8")
GRADS_FORMATS = ("exact", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    placement: str = "zero3"
    """``ddp zero1 zero2 zero3 hsdp hfsdp topo``; ``free``: ``params``, ``grads`` and ``optim`` say it; ``auto``: the
    fastest that fits, as the cost model sees ``machine``."""
    levels: dict[str, int] = field(default_factory=dict)
    """The levels of the interconnect and their sizes, slowest first: ``{node: 2, gpu: 4}``. They multiply to the
    number of workers. Empty: read from where the workers were placed."""
    params: int | None = None
    """Over how many of the innermost levels parameters are sharded (``placement=free``). params <= grads <= optim."""
    grads: int | None = None
    """The same for gradients."""
    optim: int | None = None
    """The same for optimizer states and the fp32 master weights."""
    sequence: str = ""
    """The level whose ranks share each sequence: every one has a part of the tokens, and in attention a part of the
    heads. Empty: a rank has whole sequences."""
    prefetch_units: int = 1
    """How many units are gathered ahead of the one that computes; this many plus one are alive at once."""
    overlap: bool = True
    """Whether transfers run beside compute. ``false`` waits for each at once: slower, for measuring."""
    reduce_dtype: str = "fp32"
    """Dtype in which gradients cross the links and are summed where they are exact: ``fp32`` or ``bf16``."""
    quantize: str = "none"
    """Levels over which weights travel as INT8 and gradients as INT4: ``none``, ``outer`` (the slowest) or ``all``;
    ``auto``: whichever of these is fastest, with ``placement=auto``."""
    weights_format: dict[str, str] = field(default_factory=dict)
    """By level, over ``quantize``: ``exact`` or ``int8``, as in ``{node: int8}``."""
    grads_format: dict[str, str] = field(default_factory=dict)
    """By level, over ``quantize``: ``exact``, ``int8`` or ``int4``."""
    weights_block: int = 256
    """Elements that share a scale: a power of two from 32 to 4096."""
    grads_block: int = 128
    """The same for gradients."""
    error_feedback: bool = False
    """Whether what quantization takes from a gradient is added to the next step's. Costs 4 bytes an element sent."""
    memory_gib: float | None = None
    """What a rank may hold where ``placement=auto`` chooses. None: 92% of the machine's."""
    auto_steps: int = 0
    """For how many steps each of ``candidates`` is tried at the start of a run; the fastest is taken. With
    ``placement=auto`` these are what the cost model cannot tell apart; 0: the model alone decides."""
    candidates: list[str] = field(default_factory=list)
    """Placements to try, with what they quantize: ``[zero2, hfsdp+outer, free:0:1:2]``. ``auto`` fills them in."""
    exact: list[str] = field(default_factory=list)
    """Name patterns (``*.router.*``) of parameters that are never quantized. Those of fewer than two dimensions and
    frozen ones never are."""

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"parallel.placement={self.placement!r}: choose one of {', '.join(PLACEMENTS)}")
        if self.reduce_dtype not in DTYPES:
            raise ValueError(f"parallel.reduce_dtype={self.reduce_dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.sequence and self.levels and self.sequence not in self.levels:
            raise ValueError(f"parallel.sequence={self.sequence}: parallel.levels has {', '.join(self.levels)}")
        if self.prefetch_units < 0:
            raise ValueError(f"parallel.prefetch_units={self.prefetch_units}: must be 0 or more")
        triple = (self.params, self.grads, self.optim)
        if self.placement == "free":
            if None in triple:
                raise ValueError(
                    "parallel.placement=free needs all of parallel.params, parallel.grads and parallel.optim"
                )
        elif triple != (None, None, None):
            raise ValueError(
                f"parallel.params, parallel.grads and parallel.optim are only read with parallel.placement=free, "
                f"not with parallel.placement={self.placement}"
            )
        if self.quantize not in QUANTIZE:
            raise ValueError(f"parallel.quantize={self.quantize!r}: choose one of {', '.join(QUANTIZE)}")
        if self.placement != "auto" and (self.quantize == "auto" or self.memory_gib is not None):
            raise ValueError(
                f"parallel.quantize=auto and parallel.memory_gib are only read with parallel.placement=auto, not with "
                f"parallel.placement={self.placement}"
            )
        if self.placement == "auto" and (self.weights_format or self.grads_format):
            raise ValueError(
                "parallel.weights_format and parallel.grads_format name levels by hand; with parallel.placement=auto "
                "set parallel.quantize=auto (or none, outer, all)"
            )
        for key, formats, allowed in (
            ("weights_format", self.weights_format, WEIGHTS_FORMATS),
            ("grads_format", self.grads_format, GRADS_FORMATS),
        ):
            for level, format in formats.items():
                if format not in allowed:
                    raise ValueError(f"parallel.{key}.{level}={format!r}: choose one of {', '.join(allowed)}")
        for key, block in (("weights_block", self.weights_block), ("grads_block", self.grads_block)):
            if not 32 <= block <= 4096 or block & (block - 1):
                raise ValueError(f"parallel.{key}={block}: choose a power of two from 32 to 4096")
        if self.error_feedback and not self.quantizes:
            raise ValueError(
                "parallel.error_feedback=true corrects quantized gradients, and none are: set parallel.quantize or "
                "parallel.grads_format"
            )
        if self.auto_steps < 0:
            raise ValueError(f"parallel.auto_steps={self.auto_steps}: must be 0 or more")
        if self.candidates and not self.auto_steps:
            raise ValueError("parallel.candidates are tried for parallel.auto_steps steps each: set it, 5 for example")
        if self.auto_steps and not self.candidates and self.placement != "auto":
            raise ValueError(
                f"parallel.auto_steps={self.auto_steps} has nothing to try: name parallel.candidates, or parallel=auto"
            )
        for name in self.candidates:
            self.candidate(name)
        for name, size in self.levels.items():
            if size < 1:
                raise ValueError(f"parallel.levels.{name}={size}: a level has at least one member")

    def candidate(self, name: str) -> "ParallelOptions":
        """These options with one of ``candidates`` in the place of the placement and of ``quantize``."""
        placement, _, quantize = name.removesuffix("+none").partition("+")
        placement, *triple = placement.split(":")
        number = re.compile("[0-9]+").fullmatch
        if len(triple) != (3 if placement == "free" else 0) or not all(map(number, triple)) or placement == "auto":
            raise ValueError(
                f"parallel.candidates has {name!r}: write a placement, free:P:G:O with numbers of levels, and perhaps "
                f"what it quantizes, as in zero2, free:0:1:2+outer"
            )
        params, grads, optim = map(int, triple) if triple else (None, None, None)
        return replace(
            self, placement=placement, params=params, grads=grads, optim=optim, quantize=quantize or "none",
            error_feedback=self.error_feedback and bool(quantize), memory_gib=None, candidates=[], auto_steps=0,
        )  # fmt: skip

    @property
    def sequence_ranks(self) -> int:
        """How many ranks share a sequence."""
        return self.levels.get(self.sequence, 1) if self.sequence else 1

    @property
    def quantizes(self) -> bool:
        """Whether any level may be quantized."""
        return self.quantize != "none" or bool(self.weights_format) or bool(self.grads_format)


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    name: str = "adamw"
    """``adamw`` (Loshchilov and Hutter, arXiv 1711.05101) or ``sgd``."""
    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9
    """Only read by ``sgd``."""
    weight_decay: float = 0.1
    """Decoupled for ``adamw``, L2 for ``sgd``; applied to parameters of two or more dimensions."""
    schedule: str = "cosine"
    """After the warm-up: ``cosine`` or ``linear`` decay to ``final_lr_ratio * lr``, or ``constant``."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0 to ``lr``."""
    final_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd"):
            raise ValueError(f"optimizer.name={self.name!r}: choose adamw or sgd")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"optimizer.schedule={self.schedule!r}: choose cosine, linear or constant")
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr={self.lr}: must be positive")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"optimizer.beta1={self.beta1}, optimizer.beta2={self.beta2}: both must be in [0, 1)")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum={self.momentum}: must be in [0, 1)")
        if self.eps <= 0:
            raise ValueError(f"optimizer.eps={self.eps:g}: must be positive")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay:g}: must be 0 or more")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps={self.warmup_steps}: must be 0 or more")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"optimizer.final_lr_ratio={self.final_lr_ratio}: must be in [0, 1]")
