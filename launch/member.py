"""A worker's process as the driver sees it: which actor, on which node, and how far it has come."""

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.cloudpickle
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from launch import __version__, names
from launch.checks import Crew
from launch.nodes import kill_process, on_node
from launch.options import LaunchOptions
from launch.places import Node
from launch.worker import Failure, bootstrap

END_S = 10.0
"""Longest wait until a process that does not stop is known to be killed."""


@dataclass(eq=False)
class Member:
    """A process that is a rank, or ready to be one."""

    actor: Any
    node: Node
    entered: Any
    loaded: Any
    pid: int = 0
    """0 until it has said so."""
    devices: str | None = None
    """``CUDA_VISIBLE_DEVICES`` of its place; None until it has said so."""
    own_gpu: bool = False
    """Whether Ray has given it a GPU; else it is lent that of a place."""

    def control(self, call: str, *args: Any) -> None:
        """Call a method on the thread for orders, without waiting."""
        getattr(self.actor, call).options(concurrency_group="control").remote(*args)


def start(node: Node, place: dict[str, Any], crew: Crew, options: LaunchOptions, *, own_gpu: bool) -> Member:
    """Start a process on `node`; it imports what it needs without a word more. place: Ray's options for the actor."""
    ray.cloudpickle.register_pickle_by_value(names)  # the check of the names cannot be imported by name
    kind: Any = ray.remote(concurrency_groups={"events": 1, "control": 1})(bootstrap())  # type: ignore[call-overload]
    actor = kind.options(**place, num_gpus=int(own_gpu)).remote()
    entered = actor.enter.remote(names.find_fault, __version__, os.getcwd())
    loaded = actor.load.remote(crew.device, options.threads, crew.per_node)  # queued behind
    return Member(actor, node, entered, loaded, own_gpu=own_gpu)


def end(member: Member) -> None:
    """End its process, whose node is there, also where it is stopped and heeds nobody."""
    ray.kill(member.actor)
    if member.pid:
        with suppress(RayError):
            on_node(member.node.id, kill_process, member.pid, timeout_s=END_S)


def failure_of(call: Any, member: Member) -> Failure | None:
    """Why a call that is ready has no result."""
    try:
        ray.get(call)
        return None
    except RayTaskError as error:
        return Failure(cause=str(error.cause), trace=str(error))
    except RayError as error:  # not RayActorError alone: of a process that Ray's monitor of memory has killed it is not
        cause = f"its process (pid {member.pid or 'unknown'}) died: {_exit_reason(error)}"
        preempted = isinstance(error, RayActorError) and error.preempted
        return Failure(cause=cause, kind="preemption" if preempted else "process")


def fault_of(member: Member) -> str:
    """Why a process that has been started is not ready to be a rank, and never will be; empty where it is."""
    if failure := failure_of(member.entered, member):
        return failure.cause
    fault: str | None = ray.get(member.entered)["fault"]
    if fault is None and (failure := failure_of(member.loaded, member)):
        return failure.cause
    return fault or ""


def _exit_reason(error: RayError) -> str:
    """Ray's own words on how a process ended, without the advice around them."""
    if not isinstance(error, ActorDiedError):
        return str(error).splitlines()[0]
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text
    known, guess, _ = detail.partition("Some common causes include")
    return known + "It was killed (kill -9, or out of memory) or it crashed." if guess else known
