"""What a plan is made for: memory that is wanted from one time step to another.

Time steps are whole numbers that follow execution; both ends of a life count, so a request whose last step is t and
one whose first is t may not share bytes. Nothing here imports torch.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

Timeline = list[tuple[int, dict[str, int]]]
"""(time step, bytes by owner) at each step where something changes, in order of time."""


@dataclass(frozen=True)
class Request:
    """`size_bytes` wanted from time step `first` to `last`, both included. ValueError if that is nothing."""

    name: str
    owner: str
    """Who is shown to hold it: a module, ``backward``, ``swap`` ..."""
    size_bytes: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if self.size_bytes < 1:
            raise ValueError(f"request {self.name!r} of {self.size_bytes} bytes: must be 1 or more")
        if self.last < self.first:
            raise ValueError(
                f"request {self.name!r} from step {self.first} to {self.last}: must not end before it starts"
            )

    def meets(self, other: "Request") -> bool:
        """Whether there is a step at which both are wanted."""
        return self.first <= other.last and other.first <= self.last


def rounded(size_bytes: int, align: int) -> int:
    """The least multiple of `align` that is `size_bytes` or more."""
    return -(-size_bytes // align) * align


def load_bytes(requests: Sequence[Request], align: int = 1) -> int:
    """The most bytes wanted at one time, each request rounded up to `align`: no placement can take less."""
    changes: dict[int, int] = defaultdict(int)
    for r in requests:
        size = rounded(r.size_bytes, align)
        changes[r.first] += size
        changes[r.last + 1] -= size
    return max(accumulate(changes[t] for t in sorted(changes)), default=0)


def timeline(requests: Sequence[Request]) -> Timeline:
    """Who holds how many bytes, as asked and not rounded; owners with none are left out. Fit for `json.dump`."""
    changes: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for r in requests:
        changes[r.first].append((r.owner, r.size_bytes))
        changes[r.last + 1].append((r.owner, -r.size_bytes))
    held: dict[str, int] = defaultdict(int)
    line: Timeline = []
    for t in sorted(changes):
        for owner, size in changes[t]:
            held[owner] += size
        line.append((t, {owner: size for owner, size in sorted(held.items()) if size}))
    return line


def check_fits(requests: Sequence[Request], offsets: Sequence[int], size_bytes: int) -> None:
    """ValueError unless `requests` at `offsets` lie within `size_bytes` and none that meet share a byte.

    So a plan for the longest sequences is shown to be one for shorter ones: same offsets, smaller requests.
    """
    if len(requests) != len(offsets):
        raise ValueError(f"{len(requests)} requests at {len(offsets)} offsets: must be as many")
    placed = sorted(zip(offsets, requests, strict=True), key=lambda pair: pair[0])
    for i, (start, request) in enumerate(placed):
        stop = start + request.size_bytes
        if start < 0 or stop > size_bytes:
            raise ValueError(f"request {request.name!r} at bytes {start} to {stop}: must be within 0 to {size_bytes}")
        for other_start, other in placed[i + 1 :]:
            if other_start >= stop:
                break
            if request.meets(other):
                raise ValueError(
                    f"requests {request.name!r} (bytes {start} to {stop}) and {other.name!r} (from {other_start}) "
                    f"overlap from step {max(request.first, other.first)}"
                )


@dataclass(frozen=True)
class GrowingRequest:
    """A request whose size is affine in the number of tokens of a micro-batch."""

    name: str
    owner: str
    fixed_bytes: int
    bytes_per_token: int
    first: int
    last: int

    def at(self, num_tokens: int) -> Request:
        size = self.fixed_bytes + self.bytes_per_token * num_tokens
        return Request(self.name, self.owner, size, self.first, self.last)


def growing(
    small: Sequence[Request], small_tokens: int, large: Sequence[Request], large_tokens: int
) -> tuple[GrowingRequest, ...]:
    """What grows with the tokens, from the same step recorded with few and with many.

    [Note: varying lengths] No size falls as tokens rise, and lives do not depend on them. So requests that do not
    overlap at the offsets of the plan for the most tokens do not overlap there with fewer: one plan, made once, serves
    every length, and nothing is moved or freed between steps.

    ValueError where the two differ in anything but sizes, or a size is not fixed + whole bytes * tokens.
    """
    if not 0 < small_tokens < large_tokens:
        raise ValueError(f"recorded with {small_tokens} and {large_tokens} tokens: the first must be fewer, and not 0")
    if len(small) != len(large):
        raise ValueError(
            f"{len(small)} requests with {small_tokens} tokens, {len(large)} with {large_tokens}: what is allocated "
            "depends on the length in more than size; plan each length on its own"
        )
    found = []
    for a, b in zip(small, large, strict=True):
        if (a.name, a.first, a.last) != (b.name, b.first, b.last):
            raise ValueError(f"with {small_tokens} tokens {a}, with {large_tokens} {b}: must be alike but for size")
        slope, rest = divmod(b.size_bytes - a.size_bytes, large_tokens - small_tokens)
        fixed = a.size_bytes - slope * small_tokens
        if rest or slope < 0 or fixed < 0:
            raise ValueError(
                f"request {a.name!r}: {a.size_bytes} bytes with {small_tokens} tokens, {b.size_bytes} with "
                f"{large_tokens}: must be fixed + bytes a token * tokens"
            )
        found.append(GrowingRequest(a.name, a.owner, fixed, slope, a.first, a.last))
    return tuple(found)
