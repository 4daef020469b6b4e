"""Whether a Ray cluster answers at an address, asked before Ray is imported: its own clients wait long, or abort."""

import os
import socket

HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What opens a connection: the preface and an empty SETTINGS frame (RFC 9113, section 3.4)."""
SETTINGS = 4


def probe(address: str, timeout_s: float) -> None:
    """ValueError unless an HTTP/2 server, which gRPC and so Ray is, greets there within `timeout_s`."""
    target = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    if target == "auto":
        return  # Ray finds the cluster of this machine, or says at once that there is none
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"launch.address={address}: write auto, or the host:port that ray start --head has shown")
    try:
        greeting = _greeting(host.strip("[]"), int(port), timeout_s)
    except TimeoutError as error:
        why = f"nothing came back within launch.start_timeout_s={timeout_s:g}"
        raise ValueError(no_answer(address, why)) from error
    except OSError as error:
        raise ValueError(no_answer(address, error.strerror or str(error))) from error
    if greeting is not None and (len(greeting) < 4 or greeting[3] != SETTINGS):
        raise ValueError(no_answer(address, "what answers there is not Ray"))


def _greeting(host: str, port: int, timeout_s: float) -> bytes | None:
    """The first frame's header; None where TLS would have to come first."""
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        if os.environ.get("RAY_USE_TLS", "0") == "1":
            return None
        connection.sendall(HTTP2_HELLO)
        return connection.recv(9)


def no_answer(address: str, why: str) -> str:
    return (
        f"launch.address={address}: no Ray cluster answers there ({why}); "
        f"start one (ray start --head), or leave launch.address out; where the cluster asks for a token (Ray says "
        f"InvalidAuthToken), set RAY_AUTH_MODE=token"
    )
