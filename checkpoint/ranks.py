"""What the ranks tell each other about a checkpoint: bytes over gloo, on a group that only the writer's thread uses."""

import torch
import torch.distributed as dist


class Ranks:
    """All ranks of the job; alone where `group` is None. Every method is collective and takes part from any one thread.

    Raises RuntimeError where a rank is gone or does not answer within the group's timeout.
    """

    def __init__(self, rank: int, world: int, group: dist.ProcessGroup | None) -> None:
        assert world == 1 or group is not None, "the writer's thread needs a process group of its own"
        self.rank = rank
        self.world = world
        self._group = group

    def tell(self, message: bytes) -> bytes:
        """Rank 0's message, on every rank."""
        if self.world == 1:
            return message
        size = torch.tensor([len(message)])
        dist.broadcast(size, group=self._group, group_src=0)
        buffer = _padded(message if self.rank == 0 else b"", int(size))
        dist.broadcast(buffer, group=self._group, group_src=0)
        return buffer.numpy().tobytes()

    def gather(self, message: bytes) -> list[bytes]:
        """Every rank's message, in order, on rank 0; nothing elsewhere."""
        if self.world == 1:
            return [message]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(message)]), group=self._group)
        longest = max(int(size) for size in sizes)
        buffers = [torch.empty(longest, dtype=torch.uint8) for _ in sizes] if self.rank == 0 else None
        dist.gather(_padded(message, longest), buffers, group=self._group, group_dst=0)
        return [buffer[: int(size)].numpy().tobytes() for buffer, size in zip(buffers or [], sizes, strict=False)]


def _padded(message: bytes, size: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(message.ljust(size, b"\0")) or bytearray(1), dtype=torch.uint8)[:size]
