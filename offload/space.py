"""Who has which bytes of a fixed extent: an arena of host memory, the files of a tier on NVMe.

Best fit over free ranges; neighbours that become free are joined. The sizes asked for in training are few and each is
asked for again, so best fit finds the hole that the last one left. Nothing is rounded but up to the alignment.
"""

from bisect import bisect_left, insort


class SpaceError(MemoryError):
    """An extent has no free range that is long enough."""


class Space:
    """Ranges of ``0..size_bytes``. Not safe for use by several threads at once: its owner holds a lock."""

    def __init__(self, size_bytes: int, *, align: int) -> None:
        self.size_bytes, self.align = size_bytes, align
        self._free: list[tuple[int, int]] = [(0, size_bytes)] if size_bytes else []  # (start, stop), in order
        self._taken: dict[int, int] = {}  # start -> stop
        self.peak_bytes = 0

    @property
    def taken_bytes(self) -> int:
        return self.size_bytes - sum(stop - start for start, stop in self._free)

    @property
    def largest_free_bytes(self) -> int:
        return max((stop - start for start, stop in self._free), default=0)

    def take(self, size_bytes: int, align: int | None = None) -> int:
        """Start of a range of at least `size_bytes` at a multiple of `align`; SpaceError if there is none."""
        align = align or self.align
        if size_bytes < 1 or align < 1 or align % self.align:
            raise ValueError(f"size {size_bytes}, align {align}: at least 1 byte, align a multiple of {self.align}")
        length = round_up(size_bytes, self.align)
        fits = [
            (stop - round_up(start, align) - length, start, stop)
            for start, stop in self._free
            if round_up(start, align) + length <= stop
        ]
        if not fits:
            raise SpaceError(
                f"{size_bytes} bytes asked for, {self.size_bytes - self.taken_bytes} of {self.size_bytes} are free, "
                f"{self.largest_free_bytes} of them in one piece"
            )
        _, free_start, free_stop = min(fits)
        start = round_up(free_start, align)
        self._free.remove((free_start, free_stop))
        for rest in ((free_start, start), (start + length, free_stop)):
            if rest[0] < rest[1]:
                insort(self._free, rest)
        self._taken[start] = start + length
        self.peak_bytes = max(self.peak_bytes, self.taken_bytes)
        return start

    def give(self, start: int) -> None:
        """Take back the range that begins at `start`. ValueError if none does."""
        if start not in self._taken:
            raise ValueError(f"no range begins at {start}: given back twice, or never taken here")
        stop = self._taken.pop(start)
        place = bisect_left(self._free, (start, stop))
        if place < len(self._free) and self._free[place][0] == stop:
            stop = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == start:
            start = self._free.pop(place - 1)[0]
        insort(self._free, (start, stop))

    def length(self, start: int) -> int:
        """Bytes of the range that begins at `start`, alignment included."""
        return self._taken[start] - start


def round_up(number: int, multiple: int) -> int:
    """The first multiple that is not below `number`."""
    return -(-number // multiple) * multiple
