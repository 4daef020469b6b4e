"""One node's part in the snapshots of one plan: docs/commit-protocol.md, steps 1 to 5.

Threads: requests come from the threads of their connections; one thread a version (`_make`) seals, encodes (in lanes,
a thread each) and prepares, and on the coordinator announces what became of it. All state is under `_changed`; bytes
move outside it.

[Note: who writes into a slot]
The draft's slot is written by this node's ranks (each its area, from `begin` to `written`), by the encoder's lanes
(parity 0) and by connections that bring other parities. A version that was given up is not begun anew before the
latter two are out of it (`_users`); a rank writes its area again before it says so. What a process that counts as dead
still writes is found by the CRCs, and is an erasure.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from checkpoint.crc import Bytes, idle_threads, piece_crcs
from checkpoint.erasure.protocol import versions_to_keep
from checkpoint.errors import CheckpointError
from checkpoint.snapshots.area import Manifest, Written
from checkpoint.snapshots.encoder import Encoder
from checkpoint.snapshots.fragment import PIECE_BYTES, FragmentDamaged, FragmentHeader, FragmentId
from checkpoint.snapshots.meta import dump_meta
from checkpoint.snapshots.roster import Plan
from checkpoint.snapshots.segment import Draft, Segment
from checkpoint.snapshots.wire import Connect, Message, Wire, Wires

UNKNOWN = -1
"""The step of a version that was begun before anybody wrote it."""
PATIENCE_S = 50.0
"""Longest wait for another node within a snapshot. Ranks write theirs within one step of each other."""


class GivenUp(CheckpointError):
    """The version is not made any more: another generation has begun, or the version was given up."""


@dataclass(eq=False)
class Making:
    """The version that is being made."""

    version: int
    keep: set[int]
    draft: Draft | None = None
    written: dict[int, Written] = field(default_factory=dict)
    fault: str = ""
    """Why a rank wants none of it."""
    sealed: bool = False
    arrived: dict[int, list[int]] = field(default_factory=dict)
    """By number of a parity that others make, the CRCs of its pieces as they came."""
    headers: list[FragmentHeader | None] = field(default_factory=list)
    """Of the k chunks and m parities on this node, in the layout's order."""
    thread: threading.Thread | None = None
    ended: bool = False
    """This node has prepared it, or cannot; what became of it may not be decided."""
    problem: str = ""
    """Why this node cannot."""

    @property
    def step(self) -> int:
        assert self.draft is not None
        return self.draft.step


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the last version that was opened."""

    version: int = 0
    committed: bool = False
    problem: str = ""
    last: bool = False
    """There will be no other: the coordinator is gone, or a rank takes part no more; `problem` says so."""


class Generation:
    """`areas`: of this node's ranks, (start, bytes) in the node's state. `committed`: what is restored from, if any.
    `committed_one` is called after each commit under this plan.
    """

    def __init__(
        self,
        plan: Plan,
        label: str,
        run: bytes,
        segment: Segment,
        areas: Mapping[int, tuple[int, int]],
        connect: Connect,
        committed: list[int],
        committed_one: Callable[[], None],
    ) -> None:
        self.plan, self.label, self.run, self.segment, self.areas = plan, label, run, segment, dict(areas)
        self.group, self.place = plan.place(label)
        self.layout = plan.layout(self.group)
        self._committed, self._committed_one = committed, committed_one
        self._wires, self._announcing = Wires(connect), Wires(connect)
        names = plan.groups[self.group]
        self._encoder = Encoder(self.layout, self.place, names, self._wires) if self.layout.m else None
        self.code = f"RS({self.layout.k}+{self.layout.m}) by {self._encoder.code.backend}" if self._encoder else ""
        """What this node encodes with; empty without parity."""
        self._changed = threading.Condition()
        self._announced = threading.Lock()
        self._making = self._new(plan.generation)
        self._gone: set[int] = set()
        """Ranks whose connections have ended. What they have not written will never be whole."""
        self._users = 0
        self._receiving: set[Wire] = set()
        """On which parities come."""
        self._closed = False
        self._reports: dict[str, tuple[int, str]] = {}
        """On the coordinator, of the version being made: by node its step and its problem."""
        self.outcome = Outcome()
        self.seconds: dict[str, float] = {}
        """How long the parts of the last version took."""

    @property
    def version(self) -> int:
        """The newest number that was issued."""
        return self._making.version

    # ------------------------------------------------------------------------------------------------ this node's ranks

    def grant(self, rank: int, after: int, wait_s: float) -> Message:
        """The version that `rank` may write, once there is one newer than `after`; 0: not within `wait_s`."""
        with self._changed:
            if rank not in self.areas:
                raise GivenUp(f"rank {rank} is not on node {self.label}")
            self._changed.wait_for(lambda: self._closed or self._making.version > after or self.outcome.last, wait_s)
            self._check_open()
            outcome = self.outcome
            granted = self._making.version if self._making.version > after and not outcome.last else 0
        return {
            "version": granted,
            "done": outcome.version,
            "committed": outcome.committed,
            "problem": outcome.problem,
            "last": outcome.last,
            "seconds": self.seconds,
        }

    def begin(self, version: int, step: int | None) -> int:
        """The slot to write `version` into; from here what the slot held does not exist. step: None where it is not
        known yet; who writes asks again, with it."""
        with self._changed:
            making = self._expect(version)
            if making.draft is None and not self._changed.wait_for(
                lambda: self._closed or making.draft is not None or not self._users, PATIENCE_S
            ):
                raise GivenUp(f"node {self.label} still writes what was given up before version {version}")
            self._expect(version)
            if making.draft is None:
                making.draft = self.segment.begin(version, UNKNOWN, making.keep)
                self._changed.notify_all()
            if step is None:
                return making.draft.slot
            if making.step == UNKNOWN:
                making.draft.step = step
            if making.step != step:
                raise GivenUp(f"version {version} is of step {making.step}, not {step}: the ranks are not in step")
            self._go_on(making)  # where there are no ranks
            return making.draft.slot

    def written(self, version: int, part: Written, fault: str) -> None:
        """A rank's part is there. With the last one, the snapshot goes on by itself, or is given up for a `fault`."""
        with self._changed:
            making = self._expect(version)
            start, size = self.areas[part.rank]
            if making.draft is None or part.start != start or not 0 <= part.data_bytes + part.blob_bytes <= size:
                raise GivenUp(f"rank {part.rank} wrote {part}, its area is {start} + {size}")
            making.written[part.rank] = part
            making.fault = making.fault or fault
            self._go_on(making)

    def end(self, problem: str) -> None:
        """There will be no version after the one being made: this node's ranks hear why."""
        with self._changed:
            self.outcome = replace(self.outcome, problem=problem, last=True)
            self._changed.notify_all()

    def left(self, rank: int) -> None:
        """A rank's connection has ended. Who waits for what it has not written need not."""
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()

    def _go_on(self, making: Making) -> None:
        if len(making.written) == len(self.areas) and making.thread is None:
            self._users += 1
            making.thread = threading.Thread(target=self._make, args=(making,), name="snapshot", daemon=True)
            making.thread.start()

    # ------------------------------------------------------------------------------------------------ one version

    def _make(self, making: Making) -> None:
        begun, cpu, problem = time.monotonic(), time.process_time(), ""
        try:
            if making.fault:
                raise GivenUp(making.fault)
            self._seal(making)
            sealed = time.monotonic()
            self._encode(making)
            encoded = time.monotonic()
            self._prepare(making)
            done = time.monotonic()
            self.seconds = {"seal": sealed - begun, "encode": encoded - sealed, "prepare": done - encoded}
            self.seconds["cpu"] = time.process_time() - cpu
        except Exception as error:  # whatever it is, the coordinator must learn that this version will not be
            problem = f"node {self.label}: {error if isinstance(error, CheckpointError) else repr(error)}"
            self._wires.hang_up()  # answers may be on their way that nobody waits for
        with self._changed:
            making.ended, making.problem = True, problem
            self._changed.notify_all()
        try:
            if not self._closed:
                self._tell_coordinator(making, problem)
        except CheckpointError as error:
            self.end(f"the coordinator is gone: {error}")
        finally:
            with self._changed:
                self._users -= 1  # not before: the next version's thread asks on the same connections
                self._changed.notify_all()

    def _seal(self, making: Making) -> None:
        """Make the headers of the k chunks; checkpoint/snapshots/area.py, [Note: one pass]."""
        assert making.draft is not None
        state = making.draft.payload[: self.layout.data_bytes]
        parts = tuple(making.written[rank] for rank in sorted(making.written))
        manifest = Manifest(version=making.version, step=making.step, world=self.plan.world, ranks=parts).dumps()
        state[: len(manifest)] = bytearray(manifest)
        crcs: list[int] = []
        for part in parts:
            crcs += _crcs_of(state[len(crcs) * PIECE_BYTES : part.start])
            crcs += part.sealed(state)
        crcs += _crcs_of(state[len(crcs) * PIECE_BYTES :])
        size = self.layout.chunk_bytes
        each = size // PIECE_BYTES
        with self._changed:
            for number, (stripe, element) in enumerate(self.layout.held(self.place)[: self.layout.k]):
                known = crcs[number * each : (number + 1) * each]
                making.headers[number] = self._header_of(making, stripe, element, known)
            making.sealed = True
            self._changed.notify_all()

    def _header_of(self, making: Making, stripe: int, element: int, crcs: Sequence[int]) -> FragmentHeader:
        id_, size = self._id(making, stripe, element), self.layout.chunk_bytes
        return FragmentHeader(id=id_, payload_bytes=size, piece_bytes=PIECE_BYTES, crcs=tuple(crcs))

    def _id(self, making: Making, stripe: int, element: int) -> FragmentId:
        return FragmentId(
            run=self.run,
            k=self.layout.k,
            m=self.layout.m,
            element=element,
            group=self.group,
            stripe=stripe,
            step=making.step,
            version=making.version,
        )

    def _encode(self, making: Making) -> None:
        """Make all parities of this node's stripe, and give those away that others keep."""
        if self._encoder is None:
            return
        assert making.draft is not None
        layout, stripe = self.layout, self.layout.stripe(self.place).number
        headers = self._encoder.headers(making.version)
        for number, header in enumerate(headers):
            if header.id != self._id(making, stripe, number):
                raise FragmentDamaged(f"there is {header.id}, not {self._id(making, stripe, number)}")
        own = making.draft.payload[layout.data_bytes :][: layout.chunk_bytes]
        crcs = self._encoder.encode(making.version, making.step, headers, own)
        made = [self._header_of(making, stripe, layout.k + number, crcs[number]) for number in range(layout.m)]
        self._encoder.hand_over(making.version, made[1:])
        with self._changed:
            making.headers[layout.k] = made[0]
            self._changed.notify_all()

    def receive_parity(self, message: Message, size: int, wire: Wire) -> None:
        """Take a slice of a parity that another node has made."""
        version, start, number = int(message["version"]), int(message["start"]), int(message["number"])
        chunk = self.layout.chunk_bytes
        if not (0 < number < self.layout.m and 0 <= start < start + size <= chunk) or (start | size) % PIECE_BYTES:
            raise GivenUp(f"slice {start} + {size} of parity {number}: there are {self.layout.m} of {chunk} bytes")
        self._wait_for(version, lambda making: True)
        self.begin(version, int(message["step"]))
        with self._changed:
            making = self._expect(version)
            assert making.draft is not None
            self._users += 1
            self._receiving.add(wire)
        try:
            offset = self.layout.data_bytes + number * chunk + start
            part = making.draft.payload[offset : offset + size]
            wire.receive_into(part)
            known = making.arrived.setdefault(number, [-1] * (chunk // PIECE_BYTES))
            known[start // PIECE_BYTES : (start + size) // PIECE_BYTES] = piece_crcs(part, PIECE_BYTES)
        finally:
            with self._changed:
                self._users -= 1
                self._receiving.discard(wire)
                self._changed.notify_all()

    def parity_made(self, version: int, number: int, header: FragmentHeader) -> None:
        """All of parity `number` has been sent: hold what came against what was made."""
        with self._changed:
            making = self._expect(version)
            expected = self._id(making, (self.place - number) % self.layout.n, self.layout.k + number)
            if not 0 < number < self.layout.m or header.id != expected:
                raise FragmentDamaged(f"{header.id} came as parity {number} of node {self.place}")
            if list(header.crcs) != making.arrived.get(number):
                raise FragmentDamaged(f"parity {number} of node {self.place} came with a wrong CRC-32C")
            making.headers[self.layout.k + number] = header
            self._changed.notify_all()

    def _prepare(self, making: Making) -> None:
        """Wait for the other parities, and put the version into the slot for good."""
        assert making.draft is not None
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._making is not making or self._verdict() or None not in making.headers,
                PATIENCE_S,
            )
            self._expect(making.version)
            headers = [header for header in making.headers if header is not None]
            if len(headers) < self.layout.n:
                raise GivenUp(
                    self._verdict() or f"only {len(headers)} of {self.layout.n} fragments came within {PATIENCE_S:g} s"
                )
            making.draft.commit(
                dump_meta(self.plan, self.label, headers), self.layout.data_bytes + self.layout.parity_bytes
            )

    # ------------------------------------------------------------------------------------------------ the coordinator

    def _tell_coordinator(self, making: Making, problem: str) -> None:
        if self.label != self.plan.coordinator:
            message = {"do": "report", "version": making.version, "step": making.step, "label": self.label}
            self._wires.to(self.plan.coordinator).ask(message | {"problem": problem})
            return
        self.report(making.version, self.label, making.step, problem)
        with self._changed:
            decided = self._changed.wait_for(
                lambda: self._closed or self._making is not making or self._verdict() is not None, PATIENCE_S
            )
            if self._closed or self._making is not making:
                return
            late = ", ".join(label for label in self.plan.labels if label not in self._reports)
            verdict = self._verdict() if decided else f"within {PATIENCE_S:g} s nothing came from {late}"
        self._announce(making.version, verdict or "")

    def report(self, version: int, label: str, step: int, problem: str) -> None:
        """On the coordinator: a node has prepared the version, or cannot."""
        with self._changed:
            # `_announce` goes from node to node, this one last: who heard first may be done before it is open here
            self._changed.wait_for(lambda: self._closed or self._making.version >= version, PATIENCE_S)
            if version != self._making.version:
                return  # it was given up meanwhile
            self._reports[label] = (step, problem)
            self._changed.notify_all()
            alone = self._making.thread is None and bool(problem)
        if alone:  # this node's ranks have not written yet, and may never
            self._announce(version, problem)

    def _verdict(self) -> str | None:
        """Of all reports: empty for a commit, else why not; None while some are missing and none is bad."""
        problems = [problem for _, problem in self._reports.values() if problem]
        if problems:
            return problems[0]
        if set(self._reports) != set(self.plan.labels):
            return None
        steps = {step for step, _ in self._reports.values()}
        return "" if len(steps) == 1 else f"the nodes are at different steps: {sorted(steps)}"

    def _announce(self, version: int, problem: str) -> None:
        """Tell every node what became of `version`, and open the next."""
        with self._announced:
            self._announce_once(version, problem)

    def _announce_once(self, version: int, problem: str) -> None:
        with self._changed:
            if version != self._making.version or self._closed:
                return
            committed = self._committed if problem else [*self._committed, version][-8:]
        for label in self.plan.labels:
            if label == self.label:
                continue
            message = {"do": "open", "version": version + 1, "committed": committed, "problem": problem}
            try:
                self._announcing.to(label).ask(message)
            except CheckpointError:  # who did not hear it will be missing from the next version, which says so
                self._announcing.hang_up()
        self.open(version + 1, committed, problem)

    def open(self, version: int, committed: list[int], problem: str) -> None:
        """The version before is decided; this node's ranks may write `version`."""
        with self._changed:
            if version <= self._making.version or self._closed:
                return
            committed_it, last = version - 1 in committed, self.outcome.last
            why = self.outcome.problem if last else problem
            self.outcome = Outcome(version=version - 1, committed=committed_it, problem=why, last=last)
            self._committed, self._reports = committed, {}
            self._making = self._new(version)
            self._changed.notify_all()
        if version - 1 in committed and version > self.plan.generation:
            self._committed_one()

    # ------------------------------------------------------------------------------------------------ what others read

    def sealed(self, version: int) -> Making:
        """The version being made, once its k chunks are sealed."""
        return self._wait_for(version, lambda making: making.sealed)

    def header_of(self, version: int, stripe: int) -> FragmentHeader:
        making = self.sealed(version)
        number = [held for held, _ in self.layout.held(self.place)].index(stripe)
        header = making.headers[number]
        assert header is not None
        return header

    def settle(self, wait_s: float) -> None:
        """Let a version whose ranks have all written come to its end on this node. It is not waited for what others
        say of it: some may be lost."""
        with self._changed:
            making = self._making
            self._changed.wait_for(lambda: self._closed or making.thread is None or making.ended, wait_s)

    def close(self) -> None:
        """Let go of the version being made. `version` stands still from here on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._making.thread
            for wire in self._receiving:  # who sends may be gone, and the slot must not be written any more
                wire.cut()
        self._wires.end()
        self._announcing.end()
        if thread is not None:
            thread.join()
        with self._changed:
            self._changed.wait_for(lambda: not self._users, PATIENCE_S)
        self._wires.hang_up()
        self._announcing.hang_up()

    def _new(self, version: int) -> Making:
        keep = versions_to_keep(self._committed, self.segment.num_slots)
        return Making(version, keep, headers=[None] * self.layout.n)

    def _wait_for(self, version: int, ready: Callable[[Making], bool]) -> Making:
        """`version`'s making once it is at hand and `ready`."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or self._making.version > version
                    or (self._making.version == version and (ready(self._making) or self._why_never()))
                ),
                PATIENCE_S,
            )
            making = self._expect(version)
            if not ready(making) and (why := self._why_never()):
                raise GivenUp(why)
            if not ready(making):
                raise GivenUp(f"node {self.label} has not written version {version} within {PATIENCE_S:g} s")
            return making

    def _why_never(self) -> str:
        """Why this node will not prepare the version being made; empty where it may."""
        if any(rank in self._gone and rank not in self._making.written for rank in self.areas):
            return f"a rank of node {self.label} ended before it had written version {self._making.version}"
        return self._making.problem

    def _expect(self, version: int) -> Making:
        self._check_open()
        if self._making.version != version:
            known = self.outcome.problem if self.outcome.version == version else ""
            raise GivenUp(known or f"node {self.label} makes version {self._making.version}, not {version}")
        return self._making

    def _check_open(self) -> None:
        if self._closed:
            raise GivenUp(f"node {self.label}: the snapshots of this start are over")


def _crcs_of(part: Bytes) -> list[int]:
    """Of what no rank has sealed: ends of areas, and what lies behind the last."""
    return piece_crcs(part, PIECE_BYTES, idle_threads()) if len(part) else []
