"""Which bytes of which nodes make a stripe, and who keeps the parity. Pure arithmetic.

[Note: the layout]
A group is n nodes, each a failure domain of its own; m of them may be lost; k = n - m. Node i keeps its own state
whole, S bytes (the largest node's; shorter ones count as followed by zeros), cut into k chunks of ceil(S/k) rounded up
to a page. There are n stripes. Of stripe r, parity p lies on node r + p and data element c is chunk c of node
r + m + c (all modulo n):

    n = 4, m = 1        stripe 0   stripe 1   stripe 2   stripe 3
    node 0              parity 0   chunk 2    chunk 1    chunk 0
    node 1              chunk 0    parity 0   chunk 2    chunk 1
    node 2              chunk 1    chunk 0    parity 0   chunk 2
    node 3              chunk 2    chunk 1    chunk 0    parity 0

So a stripe has exactly one element on each node, a node has one in each stripe, and losing any l nodes costs every
stripe exactly l elements; for l <= m RS(k + m) gives them back. A process that dies finds its state whole on its node.

Memory a node: k chunks of its own (S) and m of parity (S·m/k).
Traffic of a snapshot: one node encodes a stripe, that of parity 0; it gets the k chunks and sends m - 1 parities on.
Every node encodes one stripe, so each sends, and gets, k + m - 1 chunks: S·(1 + (m-1)/k). With every chunk sent to all
m parity nodes it would be S·m.

Source: rotating parity as in RAID-5, D. Patterson et al., 1988; over snapshots of nodes: REFT, arXiv 2310.12670.
"""

from dataclasses import dataclass

from checkpoint.erasure.galois import MAX_ELEMENTS

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Element:
    """Where one element of a stripe lies: `size` bytes from `offset` of a node's data or parity."""

    node: int
    parity: bool
    offset: int
    size: int


@dataclass(frozen=True)
class Stripe:
    """`elements` in the code's order: k data, then m parity. Each lies on another node."""

    number: int
    elements: tuple[Element, ...]
    encoder: int
    """The node that computes all parities: the one that keeps parity 0."""


@dataclass(frozen=True)
class GroupLayout:
    """A group of n nodes of which m may be lost, holding up to `size_bytes` each."""

    n: int
    m: int
    size_bytes: int

    def __post_init__(self) -> None:
        if self.m < 0 or self.n <= self.m or self.n > MAX_ELEMENTS:
            raise ValueError(
                f"a group of {self.n} nodes with parity {self.m}: needs more nodes than parity, "
                f"at most {MAX_ELEMENTS}; lower checkpoint.parity or add nodes"
            )
        if self.size_bytes < 1:
            raise ValueError(f"size_bytes={self.size_bytes}: a node must hold at least 1 byte")

    @property
    def k(self) -> int:
        return self.n - self.m

    @property
    def chunk_bytes(self) -> int:
        """A multiple of the page: the bytes of an element."""
        return -(-self.size_bytes // (self.k * PAGE_BYTES)) * PAGE_BYTES

    @property
    def data_bytes(self) -> int:
        """To reserve on each node for its own state, the zeros at its end included: k chunks."""
        return self.k * self.chunk_bytes

    @property
    def parity_bytes(self) -> int:
        """To reserve on each node for the others' parity: m chunks."""
        return self.m * self.chunk_bytes

    def stripes(self) -> tuple[Stripe, ...]:
        return tuple(self.stripe(number) for number in range(self.n))

    def stripe(self, number: int) -> Stripe:
        chunk = self.chunk_bytes
        data = [Element((number + self.m + c) % self.n, False, c * chunk, chunk) for c in range(self.k)]
        parity = [Element((number + p) % self.n, True, p * chunk, chunk) for p in range(self.m)]
        return Stripe(number, (*data, *parity), number)

    def held(self, node: int) -> list[tuple[int, int]]:
        """(stripe, element number) of all n elements on a node: its k chunks in order, then its m parities."""
        data = [((node - self.m - c) % self.n, c) for c in range(self.k)]
        return data + [((node - p) % self.n, self.k + p) for p in range(self.m)]
