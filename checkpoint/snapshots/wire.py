"""How snapshot processes and workers talk: plain TCP, a checked header, JSON, and bytes straight from and into memory.

A connection begins with both sides proving that they know the run's token (HMAC-SHA256 over the other's nonce; the
token itself never travels). Then one side asks and the other answers, in frames: a fixed header with the sizes of what
follows and a CRC-32C over it and the JSON, the JSON, the payload. The first request agrees on the format
(`checkpoint/snapshots/format.py`). The payload has no CRC of its own: what travels is fragments, whose headers have one
for each MiB. Nothing is unpickled. A server listens on the one address it is given.

Errors of the other side come back as text and are raised as `Refused`; what breaks a connection as `WireError`.
"""

import hmac
import json
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from checkpoint.crc import Bytes, crc32c
from checkpoint.errors import CheckpointError
from checkpoint.snapshots.format import FORMAT

Message = dict[str, Any]

_MAGIC = b"ATOLLNET"
_HEADER = struct.Struct("<8sIQ")
_CRC = struct.Struct("<I")
_HELLO = b"ATOLLHI1"
_NONCE_BYTES = 16
_PROOF_BYTES = 32
_MAX_JSON_BYTES = 64 << 20
_REACH_S = 5.0
"""Longest wait for a connection, which the other host's kernel makes: a host that is gone makes none."""
_HANDSHAKE_S = 30.0
"""Longest silence of the process behind it, which runs at a low priority: while the workers of a start import all they
need on all cores it may not run for seconds. What a node holds must not count as lost for that."""
IO_TIMEOUT_S = 60.0
"""Longest silence of the other side within a frame or before an answer."""
WORK_S = 600.0
"""The same before an answer for which a node makes or reads all its memory: some GB a second, of as much as a TB."""
_ALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
"""After so many seconds of silence the kernel asks, so often, for the other host: one that is gone says nothing."""


class WireError(CheckpointError):
    """A connection to a snapshot process cannot be made, or broke."""


class Refused(CheckpointError):
    """The other side answered that it cannot do what was asked."""


class OtherVersion(WireError):
    """The other side is of another version of Atoll; `checkpoint/snapshots/format.py`."""


@dataclass(frozen=True)
class NodeAddress:
    """Where a snapshot process listens."""

    label: str
    """Of its node: unique in the run, and new for a node that came back empty."""
    host: str
    port: int


class Wire:
    """One authenticated connection. One thread at a time."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._socket, self.name = connection, name
        self.agreed = False
        """Whether both sides are of one format. Before it a server answers to ``drop`` alone."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _ALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    @classmethod
    def connect(
        cls,
        address: NodeAddress,
        token: bytes,
        *,
        agreeing: bool = True,
        begun: Callable[["Wire"], None] = lambda wire: None,
    ) -> "Wire":
        """agreeing: without, the other side may be of any version, and only ``drop`` can be asked. begun: gets what may
        be cut while the other side is waited for."""
        name = f"the snapshot process of node {address.label} at {address.host}:{address.port}"
        try:
            connection = socket.create_connection((address.host, address.port), timeout=_REACH_S)
        except OSError as error:
            raise WireError(f"{name} cannot be reached: {error}") from error
        wire = cls(connection, name)
        try:
            begun(wire)
            connection.settimeout(_HANDSHAKE_S)
            greeting = wire._read(len(_HELLO) + _NONCE_BYTES)
            nonce = secrets.token_bytes(_NONCE_BYTES)
            wire._write(_proof(token, b"client", greeting[len(_HELLO) :]) + nonce)
            if greeting[: len(_HELLO)] != _HELLO or not hmac.compare_digest(
                wire._read(_PROOF_BYTES), _proof(token, b"server", nonce)
            ):
                raise WireError(f"{name} does not know this run's token")
            if agreeing:
                wire._agree()
        except BaseException:
            connection.close()
            raise
        return wire

    @classmethod
    def accept(cls, connection: socket.socket, token: bytes, name: str) -> "Wire":
        """The server's side; WireError for a stranger."""
        wire = cls(connection, name)
        connection.settimeout(_HANDSHAKE_S)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        wire._write(_HELLO + nonce)
        answer = wire._read(_PROOF_BYTES + _NONCE_BYTES)
        if not hmac.compare_digest(answer[:_PROOF_BYTES], _proof(token, b"client", nonce)):
            raise WireError(f"{name} does not know this run's token")
        wire._write(_proof(token, b"server", answer[_PROOF_BYTES:]))
        return wire

    def _agree(self) -> None:
        try:
            self.send({"do": "agree", "format": FORMAT})
            self.answer(wait_s=_HANDSHAKE_S)
        except Refused as error:
            raise OtherVersion(f"{self.name} is of another version of Atoll") from error

    def hear(self, message: Message) -> None:
        """The server's side of it: a request that needs no agreement passes. OtherVersion where they do not agree."""
        if message.get("do") == "agree":
            self.agreed = message.get("format") == FORMAT
        if not self.agreed and message.get("do") != "drop":
            raise OtherVersion(f"this snapshot process is of another version of Atoll (its format is {FORMAT})")

    def send(self, message: Message, payload: Bytes | None = None) -> None:
        body = json.dumps(message).encode()
        header = _HEADER.pack(_MAGIC, len(body), 0 if payload is None else len(payload))
        self._write(header + _CRC.pack(crc32c(header, body)) + body)
        if payload is not None:
            self._write(payload.data)

    def receive(self, wait_s: float | None = None) -> tuple[Message, int]:
        """The next message, and how many bytes of payload follow, for `receive_into`. EOFError at a clean end.

        wait_s: longest wait for its beginning; None: as long as it takes. What has begun goes on within `IO_TIMEOUT_S`.
        """
        self._allow(wait_s)
        begun = self._read(1, may_end=True)
        self._allow(IO_TIMEOUT_S)
        head = begun + self._read(_HEADER.size + _CRC.size - 1)
        magic, json_bytes, payload_bytes = _HEADER.unpack_from(head)
        if magic != _MAGIC or json_bytes > _MAX_JSON_BYTES:
            raise WireError(f"{self.name} sent something that is no frame")
        body = self._read(json_bytes)
        if _CRC.unpack_from(head, _HEADER.size)[0] != crc32c(head[: _HEADER.size], body):
            raise WireError(f"{self.name} sent a frame with a wrong CRC-32C")
        try:
            message = json.loads(body)
        except ValueError as error:
            raise WireError(f"{self.name} sent a frame that is not JSON") from error
        if not isinstance(message, dict):
            raise WireError(f"{self.name} sent a frame without a message")
        return message, payload_bytes

    def receive_into(self, out: Bytes) -> None:
        """The payload, whose size `out` has."""
        view, done = memoryview(out.data), 0
        while done < len(view):
            try:
                count = self._socket.recv_into(view[done:])
            except OSError as error:
                raise WireError(f"{self.name} broke off: {error}") from error
            if not count:
                raise WireError(f"{self.name} has closed the connection")
            done += count

    def ask(self, message: Message, payload: Bytes | None = None) -> Message:
        """Send a request and return the answer, which has no payload."""
        self.send(message, payload)
        return self.answer()[0]

    def answer(self, out: Bytes | None = None, *, wait_s: float = IO_TIMEOUT_S) -> tuple[Message, int]:
        """The answer to a request that was sent; its payload goes into `out`, which must have its size."""
        try:
            message, payload_bytes = self.receive(wait_s)
        except EOFError as error:
            raise WireError(f"{self.name} has closed the connection") from error
        if "refused" in message:
            raise Refused(str(message["refused"]))
        if payload_bytes != (0 if out is None else len(out)):
            raise WireError(f"{self.name} answered with {payload_bytes} bytes, not {0 if out is None else len(out)}")
        if out is not None:
            self.receive_into(out)
        return message, payload_bytes

    def close(self) -> None:
        self._socket.close()

    def cut(self) -> None:
        """Wake whoever reads or writes here, from another thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it was not connected any more

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _allow(self, silence_s: float | None) -> None:
        """How long each following read and write may take that moves nothing."""
        try:
            self._socket.settimeout(silence_s)
        except OSError as error:
            raise WireError(f"{self.name} broke off: {error}") from error

    def _write(self, content: bytes | memoryview) -> None:
        rest = memoryview(content)
        try:
            while rest:  # not `sendall`, whose timeout is for all of it, however much goes on
                rest = rest[self._socket.send(rest) :]
        except OSError as error:
            raise WireError(f"{self.name} broke off: {error}") from error

    def _read(self, size: int, *, may_end: bool = False) -> bytes:
        content = bytearray()
        while len(content) < size:
            try:
                part = self._socket.recv(size - len(content))
            except OSError as error:
                raise WireError(f"{self.name} broke off: {error}") from error
            if not part and may_end and not content:
                raise EOFError
            if not part:
                raise WireError(f"{self.name} has closed the connection")
            content += part
        return bytes(content)


Connect = Callable[[str, Callable[[Wire], None]], Wire]
"""To the node of a label; as of `Wire.connect`, ``begun``."""


class Wires:
    """Connections to nodes, by label and lane; each is made when it is first asked for, and one thread uses it."""

    def __init__(self, connect: Connect) -> None:
        self._connect, self._over = connect, False
        self._made: dict[tuple[str, int], Wire] = {}

    def to(self, label: str, lane: int = 0) -> Wire:
        """WireError where it cannot be made, or none is to be made any more."""
        key = label, lane

        def begun(wire: Wire) -> None:
            self._made[key] = wire
            if self._over:  # asked last: `end` cuts those that it finds
                raise WireError(f"the connections to node {label} are over")

        if key not in self._made:
            try:
                self._connect(label, begun)
            except BaseException:
                self._made.pop(key, None)
                raise
        return self._made[key]

    def cut(self) -> None:
        """Whoever waits on one of them fails. From any thread."""
        for wire in list(self._made.values()):
            wire.cut()

    def end(self) -> None:
        """Cut them, and make no other. From any thread."""
        self._over = True
        self.cut()

    def hang_up(self) -> None:
        for wire in self._made.values():
            wire.close()
        self._made.clear()


def _proof(token: bytes, side: bytes, nonce: bytes) -> bytes:
    return hmac.digest(token, side + nonce, "sha256")
