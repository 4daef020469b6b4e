"""What may leave GPU memory."""

from dataclasses import dataclass, field, replace

ACTIVATIONS = ("keep", "swap", "input", "recompute", "auto", "checkpoint", "stream", "stream_input")
STREAM_TOKENS = 32768
"""Of a tile where none are given: kernels work well on so many, and what is inside a block of them takes a few GB."""
STATES = ("none", "host", "nvme", "auto")
WEIGHTS = ("device", "host", "nvme")
UPDATES = ("just_in_time", "weights_first", "speculate")


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    mode: str = "keep"
    """What a block does with what its backward needs: ``keep`` it; ``swap`` it to host memory; swap its ``input`` alone
    and recompute all from it, attention too; ``recompute`` it from the block's input and attention's output, which
    stay; ``auto``: swap as much as hides behind compute and fits, or else, in this order, ``input``, ``stream`` or
    ``stream_input``; ``checkpoint``: PyTorch's, all is recomputed from the input, which stays; ``stream``: the whole
    block runs over a few tokens at a time, attention too, which takes the least of the device: as ``swap`` with α = 0,
    or ``stream_input``: as ``input``. ``offload.activations=swap`` is short for this key."""
    alpha: float | None = None
    """With ``swap``: the fraction of the tokens whose matrix products are swapped and not recomputed. None: chosen from
    measured times, as with ``auto``."""
    keep_last: int = 2
    """With ``swap``, ``input`` and ``auto``: the last blocks keep what they save, which would have to come back as it
    leaves."""
    host_bytes: int | None = None
    """The most host memory for activations; what it does not hold goes on to the drives of `OffloadOptions.nvme_path`,
    if there are any. None: what is needed, and with drives, or a chosen α, 80% of what is available."""
    tile_tokens: int | None = None
    """MLPs run over so many tokens at a time, and again in the backward: for sequences whose inner tensors do not fit.
    With ``stream`` and ``stream_input`` whole blocks do. None: over all at once, or `STREAM_TOKENS`."""

    def __post_init__(self) -> None:
        if self.mode not in ACTIVATIONS:
            raise ValueError(f"offload.activations.mode={self.mode!r}: choose one of {', '.join(ACTIVATIONS)}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"offload.activations.alpha={self.alpha}: must be from 0 to 1")
        if self.alpha is not None and self.mode != "swap":
            raise ValueError(
                f"offload.activations.alpha={self.alpha} is for offload.activations.mode=swap, not {self.mode}"
            )
        if self.keep_last < 0:
            raise ValueError(f"offload.activations.keep_last={self.keep_last}: must be 0 or more")
        if self.host_bytes is not None and self.host_bytes < 1:
            raise ValueError(f"offload.activations.host_bytes={self.host_bytes}: must be 1 or more")
        if self.tile_tokens is not None and self.tile_tokens < 1:
            raise ValueError(f"offload.activations.tile_tokens={self.tile_tokens}: must be 1 or more")

    @property
    def leave(self) -> bool:
        """Whether `offload.activations.Activations` is needed: not for what PyTorch does by itself."""
        return self.swaps or self.mode == "recompute"

    @property
    def swaps(self) -> bool:
        """Whether host memory is taken."""
        return self.mode in ("swap", "input", "auto") or self.streams

    @property
    def streams(self) -> bool:
        """Whether whole blocks run by tiles of tokens."""
        return self.mode in ("stream", "stream_input")

    @property
    def input_alone(self) -> bool:
        """Whether attention is computed again, from what alone is in host memory."""
        return self.mode in ("input", "stream_input")

    @property
    def stream_tokens(self) -> int:
        """Of a tile, of all sequences together, where `streams`."""
        return self.tile_tokens or STREAM_TOKENS

    def num_kept(self, num_blocks: int) -> int:
        """How many of so many blocks keep what they save where others do not: the last ones."""
        return min(num_blocks, self.keep_last) if self.swaps and not self.streams else 0

    @property
    def chooses(self) -> bool:
        """Whether α, or more, is still to be chosen by what is measured."""
        return self.mode == "auto" or (self.mode == "swap" and self.alpha is None)


@dataclass(frozen=True, kw_only=True)
class OffloadOptions:
    states: str = "none"
    """Where master weights and moments live that `gpu_bytes` has no room for: ``none`` (all on the device), ``host``,
    or ``nvme``: on the drives of `nvme_path`, after `host_bytes` of them in host memory. ``auto`` measures this machine
    and the model's layers, and chooses this, `weights`, `update`, `speculate_share` and `gpu_bytes` for the shortest
    step within `device_bytes`, `host_bytes` and `nvme_bytes`; drives are used where `nvme_path` names them."""
    weights: str = "device"
    """Where the weights live that the device computes with: ``device``, or ``host``: a unit's are brought when it
    runs. ``nvme``, with ``states=nvme``: as ``host``, but those whose states are on drives are there too, and their
    gradients go there; needs ``parallel`` to keep a parameter's weight where its states are (zero3, hsdp, ddp, or one
    worker), and weights that are not quantized. Weights that do not train stay in host memory."""
    update: str = "just_in_time"
    """When states in host memory are updated: ``just_in_time``, once the gradient norm is known, beside the next
    forward; ``weights_first``: likewise, but the forward waits only for new weights, and the states are written
    beside the backward: 14 bytes more read, and 2 more held, a parameter; or ``speculate``: those of `speculate_share`
    beside the backward, and again where the norm then asks for clipping. The same bits."""
    speculate_share: float = 0.6
    """Of the parameters whose states are away, the share that is speculated on, from those that run last: 12 bytes each
    more (14 with ``weights=host``). The others are updated just in time."""
    gpu_bytes: int = 0
    """Device memory for optimizer states, 12 bytes a parameter (and for weights, unless ``weights=device``): the units
    that run first get it."""
    device_bytes: int | None = None
    """Device memory that ``states=auto`` and ``activations=auto`` may plan with, all of it: weights, states,
    activations. None: for states 92% of what is free on a GPU when the run starts, on a CPU what is available; for
    activations what the GPU has, or this process may take of it."""
    host_bytes: int | None = None
    """A rank's host memory for all that is kept there. With ``states=nvme`` what does not fit goes to NVMe: states, and
    weights with ``weights=nvme``; it is an error where what is left to be there does not fit, as with ``states=host``.
    None: ``states=host`` takes what it needs, ``states=nvme`` puts no states there (nor does it with 0),
    ``states=auto`` plans with 85% of this rank's part of what is available."""
    nvme_path: list[str] = field(default_factory=list)
    """Folders on drives, one a drive; each file is scratch and removed by itself. For states, and for activations that
    swap where host memory is short; both share the drives."""
    nvme_bytes: int | None = None
    """The most that a rank may have on all drives together, states first. None: what is needed."""
    nvme_direct: bool = True
    """Past the page cache (O_DIRECT). ``false`` only where the file system refuses it: takes memory and time."""
    nvme_tbw: float | None = None
    """Terabytes (10^12 bytes) that the drives together are rated to have written to them (TBW): how long they last at
    the rate of this run is said at its start and end. None: reckoned for their capacity once a day over 5 years."""
    predict: bool = True
    """With states away: measure this machine and two blocks of the model before the first step (seconds, kept in the
    run's folder), and say how long a step should take and what limits it; later what it took."""
    threads: int | None = None
    """Of the CPU optimizer on each rank, and to take host memory for activations, whatever OMP_NUM_THREADS says. None:
    the cores of this machine over its ranks, but for one."""
    activations: ActivationOptions = field(default_factory=ActivationOptions)

    def __post_init__(self) -> None:
        allowed_by_key = {"states": STATES, "weights": WEIGHTS, "update": UPDATES}
        for key, allowed in allowed_by_key.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"offload.{key}={getattr(self, key)!r}: choose one of {', '.join(allowed)}")
        if self.weights == "host" and self.states == "none":
            raise ValueError(
                "offload.weights=host needs offload.states=host or nvme: the states would take more memory"
            )
        if self.weights == "nvme" and self.states in ("none", "host"):
            raise ValueError(
                f"offload.weights=nvme needs offload.states=nvme: offload.states={self.states} leaves what takes more "
                f"memory in front of the drives"
            )
        if self.update == "speculate" and self.states == "none":
            raise ValueError("offload.update=speculate needs offload.states=host, or nvme, for the part in host memory")
        if self.update == "weights_first" and self.states not in ("host", "auto"):
            why = "nothing is updated away" if self.states == "none" else "each update would load states twice"
            raise ValueError(f"offload.update=weights_first needs offload.states=host: with {self.states} {why}")
        if not 0 <= self.speculate_share <= 1:
            raise ValueError(f"offload.speculate_share={self.speculate_share}: must be from 0 to 1")
        if self.states == "nvme" and not self.nvme_path:
            raise ValueError("offload.states=nvme needs a folder on a drive: offload.nvme_path=[/path/on/the/drive]")
        self._check_auto()
        for key in ("gpu_bytes", "device_bytes", "host_bytes", "nvme_bytes", "nvme_tbw"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ValueError(f"offload.{key}={value}: must be 0 or more")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"offload.threads={self.threads}: at least 1")

    def with_activations(self, activations: ActivationOptions) -> "OffloadOptions":
        """These, with what was chosen for ``activations=auto``: what it was planned with is not read any more."""
        planned = self.states == "auto" or activations.mode == "auto"
        return replace(self, activations=activations, device_bytes=self.device_bytes if planned else None)

    def _check_auto(self) -> None:
        """ValueError for what would be ignored."""
        if self.states == "auto":
            for key in ("weights", "update", "speculate_share", "gpu_bytes"):
                if getattr(self, key) != getattr(OffloadOptions, key):
                    raise ValueError(
                        f"offload.{key}={getattr(self, key)}: offload.states=auto chooses it; limit it by "
                        f"offload.device_bytes, offload.host_bytes and offload.nvme_bytes, or set offload.states"
                    )
            if not self.predict:
                raise ValueError("offload.predict=false: offload.states=auto chooses by what it predicts")
        elif self.device_bytes is not None and self.activations.mode != "auto":
            raise ValueError(
                f"offload.device_bytes={self.device_bytes} is what offload.states=auto and offload.activations=auto "
                f"plan with; with offload.states={self.states} set offload.gpu_bytes, of optimizer states on the device"
            )

    @property
    def away(self) -> bool:
        """Whether anything but activations leaves the device."""
        return self.states != "none"

    @property
    def host_limit(self) -> int | None:
        """`host_bytes`, where that is a limit: in front of drives 0 only says that no states are there."""
        return self.host_bytes or None if self.states == "nvme" else self.host_bytes

    @property
    def streams_weights(self) -> bool:
        """Whether weights whose states are away are brought to the device when they are used."""
        return self.away and self.weights != "device"
