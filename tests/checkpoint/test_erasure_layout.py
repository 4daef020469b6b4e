"""Rotating parity over a group: any m nodes may be lost, and each node holds, sends and gets what the layout says."""

import itertools
from collections import Counter

import numpy as np
import pytest

from checkpoint.erasure import GroupLayout, ReedSolomon, aligned_empty

_GROUPS = [(n, m) for n in range(2, 9) for m in range(1, 4) if m < n]


class _Node:
    def __init__(self, layout: GroupLayout) -> None:
        self.data, self.parity = aligned_empty(layout.data_bytes), aligned_empty(layout.parity_bytes)
        self.data[:], self.parity[:] = 0xEE, 0xEE


def _read(nodes, element):
    region = nodes[element.node].parity if element.parity else nodes[element.node].data
    return region[element.offset : element.offset + element.size]


def _encoded(layout: GroupLayout, code: ReedSolomon) -> dict[int, _Node]:
    nodes = {node: _Node(layout) for node in range(layout.n)}
    for number, node in nodes.items():
        size = layout.size_bytes - 13 * number  # nodes hold unequal amounts
        node.data[:size] = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
        node.data[size:] = 0
    for stripe in layout.stripes():
        arrays = [_read(nodes, element) for element in stripe.elements]
        code.encode(arrays[: layout.k], arrays[layout.k :])
    return nodes


@pytest.mark.parametrize("n, m", _GROUPS)
def test_any_m_nodes_are_made_again_bitwise(n: int, m: int):
    layout = GroupLayout(n, m, 9001)
    code = ReedSolomon(layout.k, m)
    nodes = _encoded(layout, code)
    for count in range(1, m + 1):
        for lost in itertools.combinations(range(n), count):
            alive = {node: held for node, held in nodes.items() if node not in lost}
            made = {node: _Node(layout) for node in lost}
            for stripe in layout.stripes():
                left = {number: e for number, e in enumerate(stripe.elements) if e.node not in lost}
                wanted = [number for number in range(n) if number not in left]
                sources = {number: _read(alive, left[number]) for number in sorted(left)[: layout.k]}
                code.reconstruct(sources, wanted, [_read(made, stripe.elements[number]) for number in wanted])
            for node in lost:
                assert np.array_equal(made[node].data, nodes[node].data), lost
                assert np.array_equal(made[node].parity, nodes[node].parity), lost


@pytest.mark.parametrize("n, m", [*_GROUPS, (5, 0), (1, 0)])
def test_a_stripe_has_one_element_on_each_node_and_all_bytes_are_in_one(n: int, m: int):
    layout = GroupLayout(n, m, 1_000_003)
    covered = {(node, parity): Counter() for node in range(n) for parity in (False, True)}
    for stripe in layout.stripes():
        assert sorted(element.node for element in stripe.elements) == list(range(n))
        for number, element in enumerate(stripe.elements):
            assert element.size == layout.chunk_bytes and element.parity == (number >= layout.k)
            covered[element.node, element.parity][element.offset] += 1
    for (_, parity), offsets in covered.items():
        chunks = m if parity else layout.k
        assert offsets == {chunk * layout.chunk_bytes: 1 for chunk in range(chunks)}
    assert layout.data_bytes >= 1_000_003 and layout.data_bytes + layout.parity_bytes == n * layout.chunk_bytes


@pytest.mark.parametrize("n, m", _GROUPS)
def test_held_is_the_stripes_seen_from_a_node(n: int, m: int):
    layout = GroupLayout(n, m, 1)
    for node in range(n):
        elements = [layout.stripe(stripe).elements[number] for stripe, number in layout.held(node)]
        assert [element.node for element in elements] == [node] * n
        assert [element.offset for element in elements if not element.parity] == [4096 * c for c in range(layout.k)]
        assert [element.offset for element in elements if element.parity] == [4096 * p for p in range(m)]


@pytest.mark.parametrize("n, m", _GROUPS)
def test_every_node_sends_and_gets_the_same(n: int, m: int):
    """k + m - 1 chunks a snapshot: S·(1 + (m-1)/k)."""
    sent, received = Counter(), Counter()
    for stripe in GroupLayout(n, m, 1).stripes():
        k = n - m
        for number, element in enumerate(stripe.elements):
            if element.node != stripe.encoder:
                (sent if number < k else received)[element.node] += 1
                (received if number < k else sent)[stripe.encoder] += 1
    assert set(sent.values()) == set(received.values()) == {n - 1}


def test_sizes_are_rounded_to_pages():
    layout = GroupLayout(6, 2, 4 * 4096 * 10 + 1)
    assert (layout.k, layout.chunk_bytes) == (4, 11 * 4096)
    assert (layout.data_bytes, layout.parity_bytes) == (44 * 4096, 22 * 4096)


@pytest.mark.parametrize("n, m", [(2, 2), (3, -1), (256, 1)])
def test_impossible_groups_are_refused(n: int, m: int):
    with pytest.raises(ValueError, match="lower checkpoint.parity or add nodes"):
        GroupLayout(n, m, 1)
