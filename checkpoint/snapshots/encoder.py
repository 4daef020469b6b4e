"""The parities of one node's stripe, from the chunks of the nodes that have one: docs/commit-protocol.md, step 3.

The chunks come slice by slice in several lanes, a thread and connections each. Every slice is checked against its
chunk's header and encoded; parity 0 stays here, the others go on to who keeps them.
"""

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from checkpoint.crc import Bytes, idle_threads, piece_crcs
from checkpoint.erasure import ReedSolomon, aligned_empty
from checkpoint.erasure.layout import Element, GroupLayout
from checkpoint.snapshots.fragment import PIECE_BYTES, FragmentDamaged, FragmentHeader
from checkpoint.snapshots.wire import Message, Wires

SLICE_BYTES = 4 * PIECE_BYTES
"""Of each element, pulled and encoded at a time by a lane."""


class Encoder:
    """Of the node at `place` of the group of nodes `names`, which has parity."""

    def __init__(self, layout: GroupLayout, place: int, names: Sequence[str], wires: Wires) -> None:
        self._layout, self._stripe, self._names, self._wires = layout, layout.stripe(place), names, wires
        self.code = ReedSolomon(layout.k, layout.m)

    def headers(self, version: int) -> list[FragmentHeader]:
        """Of the k chunks, as their nodes say once they have sealed them."""
        found = []
        for element in self._stripe.elements[: self._layout.k]:
            message = {"do": "header", "version": version, "stripe": self._stripe.number}
            answer = self._wires.to(self._names[element.node]).ask(message)
            found.append(FragmentHeader.loads(bytes.fromhex(str(answer["header"]))))
        return found

    def encode(self, version: int, step: int, headers: Sequence[FragmentHeader], own: Bytes) -> list[list[int]]:
        """Make all m parities, the first into `own`, and send the others on. Returns the CRCs of their pieces."""
        layout = self._layout
        crcs = [[0] * (layout.chunk_bytes // PIECE_BYTES) for _ in range(layout.m)]
        starts = range(0, layout.chunk_bytes, SLICE_BYTES)
        lanes = min(idle_threads(), len(starts))

        def run(lane: int) -> None:
            self._run(version, step, headers, own, crcs, lane, starts[lane::lanes])

        with ThreadPoolExecutor(lanes, thread_name_prefix="lane") as pool:
            calls = [pool.submit(run, lane) for lane in range(lanes)]
            failed = [call for call in wait(calls, return_when=FIRST_EXCEPTION).done if call.exception()]
            if failed:
                self._wires.cut()  # the other lanes need not go on
        for call in [*failed, *calls]:
            call.result()
        return crcs

    def hand_over(self, version: int, headers: Sequence[FragmentHeader]) -> None:
        """All of the parities from the second on has been sent: `headers` are theirs."""
        for number, (element, header) in enumerate(zip(self._others, headers, strict=True), 1):
            message = {"do": "parity made", "version": version, "number": number, "header": header.dumps().hex()}
            self._wires.to(self._names[element.node]).ask(message)

    @property
    def _others(self) -> Sequence[Element]:
        """The parities that other nodes keep."""
        return self._stripe.elements[self._layout.k + 1 :]

    def _run(
        self,
        version: int,
        step: int,
        headers: Sequence[FragmentHeader],
        own: Bytes,
        crcs: list[list[int]],
        lane: int,
        starts: range,
    ) -> None:
        """Slices of the stripe that begin at `starts`; `crcs` gets those of their parities' pieces."""
        layout, names = self._layout, self._names
        data = self._stripe.elements[: layout.k]
        sources = [self._wires.to(names[element.node], lane) for element in data]
        keepers = [self._wires.to(names[element.node], lane) for element in self._others]
        pulled = [aligned_empty(SLICE_BYTES) for _ in data]
        made = [aligned_empty(SLICE_BYTES) for _ in keepers]

        def request(start: int) -> None:
            for wire, element in zip(sources, data, strict=True):
                size = min(SLICE_BYTES, layout.chunk_bytes - start)
                wire.send({"do": "read", "version": version, "offset": element.offset + start, "size": size})

        request(starts[0])
        for turn, start in enumerate(starts):
            size, first = min(SLICE_BYTES, layout.chunk_bytes - start), start // PIECE_BYTES
            for wire, header, buffer in zip(sources, headers, pulled, strict=True):
                wire.answer(buffer[:size])
                _check(header, buffer[:size], first)
            if turn + 1 < len(starts):
                request(starts[turn + 1])  # on its way while this slice is encoded
            outputs = [own[start : start + size], *(buffer[:size] for buffer in made)]
            self.code.encode([buffer[:size] for buffer in pulled], outputs)
            for known, output in zip(crcs, outputs, strict=True):
                known[first : first + size // PIECE_BYTES] = piece_crcs(output, PIECE_BYTES)
            for number, (wire, output) in enumerate(zip(keepers, outputs[1:], strict=True), 1):
                if turn:
                    wire.answer()
                message: Message = {"do": "parity", "version": version, "step": step, "start": start, "number": number}
                wire.send(message, output)
        for wire in keepers:
            wire.answer()


def _check(header: FragmentHeader, part: Bytes, first: int) -> None:
    found = piece_crcs(part, header.piece_bytes)
    if found != list(header.crcs[first : first + len(found)]):
        raise FragmentDamaged(f"element {header.id.element} of stripe {header.id.stripe} came with a wrong CRC-32C")
