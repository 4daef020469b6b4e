"""How a rank gets out of a process group whose other members may be dead.

[Note: getting out]
A collective of gloo waits in C++ for bytes from its peers. The neighbours of a dead rank see their connection closed
and raise at once; the others wait for a neighbour that waits itself, until the collective's timeout. `abort` of the
group does not wake them (torch 2.13). What does is the end of their own connections: gloo then raises as for a dead
peer. So `break_connections` shuts down every connection of every group of this process. NCCL's own abort works.

Which sockets are gloo's is read from the kernel: each of its groups has a loop of its own, an epoll instance that holds
its listening socket and all its connections; so has the store that rank 0 serves. Ray's are older than the `WayOut`.
"""

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

_SELF = Path("/proc/self")


class WayOut:
    """Of all process groups that are made after it, for another thread than the one that waits. Each call may be
    repeated, as new groups and connections may have come."""

    def __init__(self) -> None:
        self._others = set(_event_loops())
        self._aborted: list[Any] = []

    def break_connections(self) -> int:
        """Shut down all connections of gloo; how many."""
        broken = 0
        for loop in set(_event_loops()) - self._others:
            sockets = [duplicate for fd in _watched(loop) if (duplicate := _socket(fd)) is not None]
            listens = any(_listens(each) for each in sockets)
            for each in sockets:
                with each, suppress(OSError):  # not connected any more
                    if listens and not _listens(each):  # a listening socket that is shut down aborts gloo
                        each.shutdown(socket.SHUT_RDWR)
                        broken += 1
        return broken

    def abort_nccl(self) -> None:
        """End what waits in NCCL on this process's GPU. The groups can only be destroyed after it."""
        import torch
        from torch import distributed as dist

        if not (dist.is_initialized() and torch.cuda.is_initialized() and dist.is_nccl_available()):
            return
        found: list[Any] = []
        with suppress(RuntimeError):  # the other thread is just making a group: the next try has it
            for group in list(dist.distributed_c10d._world.pg_map):
                with suppress(RuntimeError):  # a group of hosts alone
                    found.append(group._get_backend(torch.device("cuda")))
        fresh = [backend for backend in found if backend not in self._aborted]
        self._aborted = found
        if fresh:
            fresh[0]._group_start()  # together, else one waits for the kernels of another (pytorch#119797)
            for backend in fresh:
                backend.abort()
            fresh[0]._group_end()

    def forget(self) -> None:
        """The groups are destroyed: hold on to none."""
        self._aborted = []


def _event_loops() -> list[int]:
    """File descriptors of epoll instances."""
    found = []
    for entry in os.listdir(_SELF / "fd"):
        with suppress(OSError):
            if os.readlink(_SELF / "fd" / entry) == "anon_inode:[eventpoll]":
                found.append(int(entry))
    return found


def _watched(loop: int) -> list[int]:
    """The descriptors that an epoll instance watches (proc(5), fdinfo)."""
    with suppress(OSError):
        lines = (_SELF / "fdinfo" / str(loop)).read_text().splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith("tfd:")]
    return []


def _socket(fd: int) -> socket.socket | None:
    """A duplicate, whose closing leaves the original open; None for anything else."""
    try:
        return socket.socket(fileno=os.dup(fd))
    except OSError:
        return None


def _listens(each: socket.socket) -> bool:
    return bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def leave() -> None:
    """Destroy all groups of this process, and let go of what was bound to them."""
    from torch import distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        free_memory()


def free_memory() -> None:
    """Of a trainer that has ended."""
    import gc

    import torch

    gc.collect()  # models and their hooks hold each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
