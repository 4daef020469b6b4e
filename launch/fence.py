"""A rank that writes the run's folder ends itself where its machine is cut off from the cluster.

The others have gone on without it by then, and want the folder. It cannot be told: nothing reaches it. Ray ends the
processes of such a machine too, but after minutes.
"""

import os
import socket
import sys
import threading
import time

EVERY_S = 2.0
CUT_OFF_S = 10.0
"""After so much silence; the others take a machine for lost after 3 s of it."""


class Fence:
    """Knocks at `address` (``host:port``) as long as it is open."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._address = host.strip("[]"), int(port)
        self._open = threading.Event()
        threading.Thread(target=self._watch, name="fence", daemon=True).start()

    def close(self) -> None:
        self._open.set()

    def _watch(self) -> None:
        heard = time.monotonic()
        while not self._open.wait(EVERY_S):
            if not silent(self._address, EVERY_S):
                heard = time.monotonic()
            elif time.monotonic() - heard > CUT_OFF_S and not self._open.is_set():
                where = ":".join(map(str, self._address))
                print(f"nothing comes from {where} for {CUT_OFF_S:g} s: this machine is cut off", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)


def silent(address: tuple[str, int], timeout_s: float) -> bool:
    """Whether nobody answers there. A refusal is an answer."""
    try:
        with socket.create_connection(address, timeout=timeout_s):
            return False
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
