"""The snapshot process of a node: owns the node's shared memory, and outlives its workers.

It listens on one address for those who know the run's token: the node's ranks, the other nodes' processes, and whoever
restores. A request is answered on the thread of its connection. What belongs to the snapshots of one start of the ranks
is in a `Generation`; here are the segments, which live longer, and the end: by `drop`, or once no rank has been
connected for `hold_s`. It imports no torch and holds no state of the training but what lies in the segments.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from checkpoint.crc import Bytes, idle_threads
from checkpoint.errors import CheckpointError
from checkpoint.snapshots.area import Written
from checkpoint.snapshots.fragment import PIECE_BYTES, FragmentDamaged, FragmentHeader
from checkpoint.snapshots.generation import Generation, GivenUp
from checkpoint.snapshots.meta import load_meta, meta_bytes
from checkpoint.snapshots.roster import Plan
from checkpoint.snapshots.segment import Segment, Version
from checkpoint.snapshots.segment_files import FOLDER, NoRoom, SegmentError, remove_leftovers
from checkpoint.snapshots.wire import Connect, Message, NodeAddress, Wire, WireError

_log = logging.getLogger(__name__)

NUM_SLOTS = 2
SETTLE_S = 5.0
"""How long who restores waits for a version that all ranks of this node have written."""
_POLL_S = 0.5


class SnapshotNode:
    """Listens from the start; `serve` until the end. `port` is chosen by the kernel."""

    def __init__(
        self, run: bytes, label: str, token: bytes, host: str, *, hold_s: float = 900.0, folder: str = FOLDER
    ) -> None:
        remove_leftovers(folder)
        self.run, self.label, self._token, self._folder, self._hold_s = run, label, token, folder, hold_s
        self._listener = socket.create_server((host, 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.RLock()  # of segments and generations; never held while waiting for another node
        self._segments: list[Segment] = []
        self._generation: Generation | None = None
        self._starting = threading.Lock()  # what new starts ask for is done one after the other
        self._wires: set[Wire] = set()
        self._num_ranks, self._last_rank = 0, time.monotonic()
        self._ended = threading.Event()

    def serve(self) -> None:
        """Answer until dropped or left alone; then remove the segments."""
        self._listener.settimeout(_POLL_S)
        try:
            while not self._ended.is_set() and not self._left_alone():
                try:
                    connection, peer = self._listener.accept()
                except TimeoutError:
                    continue
                except OSError as error:  # no descriptor is left for it, say: what is held is not lost for that
                    _log.warning("node %s cannot take a connection: %s", self.label, error)
                    self._ended.wait(_POLL_S)
                    continue
                try:
                    threading.Thread(target=self._talk, args=(connection, str(peer)), daemon=True).start()
                except RuntimeError as error:  # nor a thread
                    _log.warning("node %s cannot take a connection: %s", self.label, error)
                    connection.close()
        finally:
            self.close()

    def _left_alone(self) -> bool:
        alone_s = time.monotonic() - self._last_rank
        if self._num_ranks or alone_s <= self._hold_s:
            return False
        _log.warning("no worker for %.0f s: the snapshots of node %s are dropped", alone_s, self.label)
        return True

    def close(self) -> None:
        """End everything and remove the segments."""
        self._ended.set()
        self._listener.close()
        with self._starting:
            generation, self._generation = self._generation, None
            if generation is not None:
                generation.close()
        with self._lock:
            for segment in self._segments:
                segment.destroy()
            self._segments = []
            remove_leftovers(self._folder)  # of other nodes of this machine that were killed
            for wire in list(self._wires):
                wire.cut()

    # ------------------------------------------------------------------------------------------------ connections

    def _talk(self, connection: socket.socket, name: str) -> None:
        try:
            with Wire.accept(connection, self._token, name) as wire:
                self._wires.add(wire)
                try:
                    while not self._ended.is_set():
                        message, size = wire.receive()
                        self._answer(wire, message, size)
                finally:
                    self._wires.discard(wire)
        except EOFError:
            pass
        except CheckpointError as error:
            _log.info("%s", error)
        finally:
            connection.close()

    def _answer(self, wire: Wire, message: Message, size: int) -> None:
        payload: Bytes | None = None
        try:
            wire.hear(message)
            what = message.get("do")
            if what == "parity":
                self._running().receive_parity(message, size, wire)
                reply: Message = {}
            elif size:
                raise CheckpointError(f"{what!r} has no payload")
            elif what == "attach":
                generation, rank = self._running(int(message["generation"])), int(message["rank"])
                with self._attached():
                    wire.send({})
                    self._serve_rank(wire, generation, rank)
                return
            elif what == "read":
                payload = self._read(int(message["version"]), int(message["offset"]), int(message["size"]))
                reply = {}
            else:
                reply = self._do(str(what), message)
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            text = str(error) if isinstance(error, CheckpointError) else repr(error)
            wire.send({"refused": text})
            if size:
                raise CheckpointError(f"refused a payload: {text}") from error  # which still stands in the connection
            return
        wire.send(reply, payload)
        if message.get("do") == "drop":
            self._ended.set()

    def _serve_rank(self, wire: Wire, generation: Generation, rank: int) -> None:
        """Of this generation alone: the connection of a start before may end, or ask, when the next has begun."""
        try:
            while not self._ended.is_set():
                message, size = wire.receive()
                self._answer(wire, message, size)
        finally:
            generation.left(rank)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """A rank is there, or waits to be; without any the process ends after a while."""
        with self._lock:
            self._num_ranks += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_ranks -= 1
                self._last_rank = time.monotonic()

    def _do(self, what: str, message: Message) -> Message:
        if what == "inventory":
            return self._inventory()
        if what == "configure":
            with self._attached(), self._starting:  # memory is made, for which the ranks wait
                return self._configure(message)
        if what == "retire":
            with self._starting:
                return self._retire()
        if what == "check":
            return {"bad": self._check(int(message["version"]))}
        if what == "headers":
            return {"headers": [raw.hex() for raw in load_meta(self._held(int(message["version"])).meta)[2]]}
        if what == "grant":
            generation = self._running(int(message["generation"]))
            return generation.grant(int(message["rank"]), int(message["after"]), float(message["wait_s"]))
        if what == "end":
            self._running(int(message["generation"])).end(str(message["problem"]))
            return {}
        if what == "begin":
            step = message["step"]
            return {"slot": self._running().begin(int(message["version"]), None if step is None else int(step))}
        if what == "written":
            self._running().written(int(message["version"]), Written(**message["part"]), str(message["fault"]))
            return {}
        if what == "header":
            header = self._running().header_of(int(message["version"]), int(message["stripe"]))
            return {"header": header.dumps().hex()}
        if what == "parity made":
            header = FragmentHeader.loads(bytes.fromhex(str(message["header"])))
            self._running().parity_made(int(message["version"]), int(message["number"]), header)
            return {}
        if what == "report":
            arguments = int(message["version"]), str(message["label"]), int(message["step"]), str(message["problem"])
            self._running().report(*arguments)
            return {}
        if what == "open":
            committed = [int(version) for version in message["committed"]]
            self._running().open(int(message["version"]), committed, str(message["problem"]))
            return {}
        if what in ("agree", "drop"):
            return {}
        raise CheckpointError(f"the snapshot process does not know {what!r}")

    # ------------------------------------------------------------------------------------------------ what is held

    def _inventory(self) -> Message:
        """The versions that this node has prepared, and under which plans."""
        generation = self._generation
        if generation is not None:
            generation.settle(SETTLE_S)
        with self._lock:
            held = {}
            for version in self._versions():
                try:
                    plan, label, _ = load_meta(version.meta)
                except (ValueError, KeyError, IndexError) as error:
                    _log.warning("version %d on node %s: %s", version.version, self.label, error)
                    continue
                held[version.version] = {"step": version.step, "plan": plan.tree(), "label": label}
        return {"label": self.label, "pid": os.getpid(), "held": held}

    def _versions(self) -> list[Version]:
        with self._lock:  # a segment may be removed meanwhile
            return [version for segment in self._segments for version in segment.committed()]

    def _held(self, number: int) -> Version:
        for version in self._versions():
            if version.version == number:
                return version
        raise GivenUp(f"node {self.label} does not hold version {number}")

    def _read(self, number: int, offset: int, size: int) -> Bytes:
        """Bytes of a version's state or parities: of one that is prepared, or being made and sealed."""
        found = next((version.payload for version in self._versions() if version.version == number), None)
        if found is None:
            draft = self._running().sealed(number).draft
            assert draft is not None
            found = draft.payload
        if offset < 0 or size < 1 or offset + size > len(found):
            raise CheckpointError(f"bytes {offset} + {size} of {len(found)}")
        return found[offset : offset + size]

    def _check(self, number: int) -> list[list[int]]:
        """By fragment (k chunks, then m parities) the pieces whose CRC-32C is wrong."""
        version = self._held(number)
        plan, label, headers = load_meta(version.meta)
        layout = plan.layout(plan.place(label)[0])
        found = []
        for place, raw in enumerate(headers):
            fragment = version.payload[place * layout.chunk_bytes : (place + 1) * layout.chunk_bytes]
            try:
                found.append(FragmentHeader.loads(raw).bad_pieces(fragment, idle_threads()))
            except FragmentDamaged:
                found.append(list(range(-(-layout.chunk_bytes // PIECE_BYTES))))
        return found

    # ------------------------------------------------------------------------------------------------ a new start

    def _retire(self) -> Message:
        """The ranks are starting again: end the generation of those before, and say the newest number it has issued.

        What it was making is given up, so that the number stands still until the new plan, which begins above the
        newest of all nodes, is there: `_configure` refuses it only where another start has come between.
        """
        generation = self._generation
        if generation is None:
            return {"last_issued": 0}
        generation.close()
        return {"last_issued": generation.version}

    def _configure(self, message: Message) -> Message:
        """The ranks have started (again): begin a generation. What is newer than `keep` goes; everything without it."""
        plan, keep = Plan.of(message["plan"]), message["keep"]
        addresses = {node["label"]: NodeAddress(**node) for node in message["nodes"]}
        areas = {int(rank): (int(start), int(size)) for rank, start, size in message["areas"]}
        with self._lock:
            old = self._generation
            if old is not None and plan.generation <= old.version:
                raise GivenUp(f"another start of the run has taken node {self.label} over")
            self._generation = None
        if old is not None:
            old.close()
        with self._lock:
            if self._ended.is_set():  # nobody would remove what is made now
                raise GivenUp(f"node {self.label} has ended")
            for version in self._versions():
                if keep is None or version.version > keep:
                    version.segment.discard(version.version)
            try:
                segment, note = self._segment(plan)
            except NoRoom as error:
                return {"no_room": str(error)}
            committed = [] if keep is None else [int(keep)]
            generation = Generation(
                plan,
                self.label,
                self.run,
                segment,
                areas,
                _connector(addresses, self._token),
                committed,
                lambda: self._drop_others(generation),
            )
            self._generation = generation
        return {"path": str(segment.path), "note": note, "code": generation.code}

    def _segment(self, plan: Plan) -> tuple[Segment, str]:
        """One that fits: as it is if it is there, else new, beside those that hold something. And what to say."""
        layout = plan.layout(plan.place(self.label)[0])
        payload, meta = layout.data_bytes + layout.parity_bytes, meta_bytes(plan, self.label)
        fitting = [s for s in self._segments if s.payload_bytes == payload and s.meta_bytes >= meta]
        if fitting:
            return fitting[0], ""
        for segment in [s for s in self._segments if not s.committed()]:
            self._remove(segment)

        def create() -> Segment:
            label = f"{self.label}-{plan.generation}"
            made = Segment.create(
                self.run, label, num_slots=NUM_SLOTS, payload_bytes=payload, meta_bytes=meta, folder=self._folder
            )
            self._segments.append(made)
            return made

        try:
            return create(), ""
        except SegmentError:
            if not self._segments:
                raise
        for segment in list(self._segments):
            self._remove(segment)
        return create(), f"node {self.label}: no room beside the snapshots of the other number of ranks: dropped them"

    def _drop_others(self, current: Generation) -> None:
        """Once there is a commit of this generation nobody will ask for older ones in other segments."""
        with self._lock:
            if self._generation is not current:  # the next has begun meanwhile, and may have a segment of its own
                return
            for segment in [s for s in self._segments if s is not current.segment]:
                self._remove(segment)

    def _remove(self, segment: Segment) -> None:
        self._segments.remove(segment)
        segment.destroy()

    def _running(self, number: int | None = None) -> Generation:
        """The generation; `number`: this one, and no other."""
        generation = self._generation
        if generation is None:
            raise GivenUp(f"node {self.label} takes part in no snapshots yet")
        if number not in (None, generation.plan.generation):
            raise GivenUp(f"another start of the run has taken node {self.label} over")
        return generation


def _connector(addresses: Mapping[str, NodeAddress], token: bytes) -> Connect:
    def connect(label: str, begun: Callable[[Wire], None]) -> Wire:
        if label not in addresses:
            raise WireError(f"node {label} is not among those that take part")
        return Wire.connect(addresses[label], token, begun=begun)

    return connect
