"""What a node or the coordinator decides in the commit protocol, as pure functions. See docs/commit-protocol.md.

A node has *prepared* a version once its own state and all parity it keeps lie in one of its slots, checked, under a
commit record. A version is *committed* once every node of every group has prepared it.
`tests/checkpoint/test_erasure_protocol.py` goes through all interleavings of a small cluster that uses these functions.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

Held = Mapping[int, Collection[int]]
"""By node of a group that answers: the versions it has prepared and not thrown away."""


def versions_to_keep(committed: Iterable[int], num_slots: int) -> set[int]:
    """What the next snapshot must not overwrite: the newest commits, one fewer than there are slots.

    2 slots: one committed version at every instant, two between snapshots. 3 slots: two at every instant.
    """
    if num_slots < 2:
        raise ValueError(f"num_slots={num_slots}: with fewer than 2 a crash while writing loses everything")
    return set(sorted(committed, reverse=True)[: num_slots - 1])


def slot_for(slots: Sequence[int | None], keep: Collection[int]) -> int:
    """The slot to write the next version to. `slots`: the prepared version in each, None for none.

    First one without a prepared version, then the oldest that need not be kept.
    """
    free = [number for number, version in enumerate(slots) if version is None]
    old = sorted((version, number) for number, version in enumerate(slots) if version is not None)
    candidates = free + [number for version, number in old if version not in keep]
    if not candidates:
        raise ValueError(f"all slots hold versions to keep: {sorted(keep)}; one slot more than versions is needed")
    return candidates[0]


def recoverable(groups: Sequence[tuple[Held, int]]) -> list[int]:
    """Versions that can be restored, newest first: prepared by at least k nodes of every group.

    `groups`: what each holds, and its k (nodes less parity). k prepared nodes are enough, although a version counts as
    committed only when all have prepared it: each stripe has one element on each node, so k nodes have k elements of
    every stripe, and a parity exists only if all data of its stripe did.
    """
    if not groups:
        return []
    found: set[int] | None = None
    for held, k in groups:
        versions = [version for prepared in held.values() for version in set(prepared)]
        enough = {version for version in versions if versions.count(version) >= k}
        found = enough if found is None else found & enough
    return sorted(found or (), reverse=True)
