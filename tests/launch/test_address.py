"""An address at which no Ray cluster answers is an error within ``launch.start_timeout_s``."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from launch.address import probe


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def address(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_port_that_accepts_and_says_nothing(server: socket.socket) -> None:
    with pytest.raises(ValueError, match=r"nothing came back within launch\.start_timeout_s=0\.2"):
        probe(address(server), 0.2)


def test_a_server_of_another_kind(server: socket.socket) -> None:
    threading.Thread(
        target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), daemon=True
    ).start()
    with pytest.raises(ValueError, match="not Ray"):
        probe(address(server), 5)


def test_a_closed_port(server: socket.socket) -> None:
    closed = address(server)
    server.close()
    with pytest.raises(ValueError, match="refused"):
        probe(closed, 5)


@pytest.mark.parametrize("given", ["somewhere", "host:", ":6379", "ray"])
def test_no_address_at_all(given: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        probe(given, 5)


@pytest.mark.ray
def test_a_server_that_greets_like_ray_and_then_falls_silent(atoll, server: socket.socket) -> None:
    connections = []

    def greet() -> None:
        with suppress(OSError):  # the server is shut down, or who has greeted is gone
            while True:
                connections.append(server.accept()[0])
                connections[-1].sendall(b"\0\0\0\4\0\0\0\0\0")

    greeting = threading.Thread(target=greet)
    greeting.start()
    done = atoll("train", f"launch.address={address(server)}", "launch.start_timeout_s=1", timeout_s=40)
    server.shutdown(socket.SHUT_RDWR)
    greeting.join(10)
    assert done.returncode == 2 and "launch.start_timeout_s=1" in done.stderr
