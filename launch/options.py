"""Where and how the workers run."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    workers: int | None = None
    """Workers in all, one process each (one GPU each where there are GPUs). None: one per GPU, else two on CPU."""
    nodes: int = 1
    """Nodes they are spread over evenly."""
    address: str | None = None
    """Address of a running Ray cluster (``auto``, ``10.0.0.1:6379``). None: one is started on this machine."""
    device: str = "auto"
    """``cuda``, ``cpu``, or ``auto``: cuda where the machine has a GPU."""
    threads: int | None = None
    """CPU threads of a worker. None: the node's cores divided by its workers, whatever OMP_NUM_THREADS says."""
    start_timeout_s: float = 120.0
    """Longest wait for the cluster to answer and for the workers to be placed and joined."""
    collective_timeout_s: float = 600.0
    """A collective that takes longer than this fails its worker."""
    notice_s: float = 0.0
    """After a SIGTERM the run ends within this time, resumable, even if its step, validation or checkpoint then under
    way would take longer: set it below what the machine's owner leaves. 0: it ends after them."""
    hang_timeout_s: float = 300.0
    """Within this time a rank that stands still is found and reported as a hang, with its stack and who waits for it.
    0: never. Finding it is part of that, a fifth or 10 s: give it a third more than the longest micro-batch takes. What
    may compile, and checkpoints, have ``collective_timeout_s``."""
    max_failures: int = 16
    """Failures that are recovered from, in all; the count starts anew after 100 steps without one. 0: none is."""
    max_preemptions: int = 64
    """The same for nodes that were claimed back, which are no fault of the job."""
    spares: int | None = None
    """Processes with torch imported that each node keeps ready to replace a worker. None: 1 with snapshots, else 0."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"launch.workers={self.workers}: at least one worker")
        if self.nodes < 1:
            raise ValueError(f"launch.nodes={self.nodes}: at least one node")
        if self.workers is not None and self.workers % self.nodes:
            raise ValueError(f"launch.workers={self.workers} must be divisible by launch.nodes={self.nodes}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"launch.device={self.device!r}: choose auto, cpu or cuda")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"launch.threads={self.threads}: at least one thread")
        if self.max_failures < 0 or self.max_preemptions < 0:
            raise ValueError(
                f"launch.max_failures={self.max_failures}, launch.max_preemptions={self.max_preemptions}: 0 or more"
            )
        if self.spares is not None and self.spares < 0:
            raise ValueError(f"launch.spares={self.spares}: 0 or more")
        if self.start_timeout_s <= 0 or self.collective_timeout_s <= 0:
            raise ValueError("launch.start_timeout_s and launch.collective_timeout_s must be positive")
        if self.notice_s < 0:
            raise ValueError(f"launch.notice_s={self.notice_s:g}: must be positive, or 0 for no limit")
        if self.hang_timeout_s < 0:
            raise ValueError(f"launch.hang_timeout_s={self.hang_timeout_s:g}: must be positive, or 0 for no watchdog")
