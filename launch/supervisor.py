"""Keeps a job on Ray going until it ends: a state machine on the driver.

    acquire ──► start ──► train ──► finish
                 ▲ │        │ ▲
                 │ └─fails──┤ │ failed
                 │          ▼ │
              recover ◄── diagnose ──► finish: the budget is used up, or it would not help

acquire   nodes for the ranks (`Places`)
start     processes on them, a process group, snapshot processes; the ranks restore and train
train     watch; between whiles keep spares ready, and look for nodes that come and go
diagnose  get the survivors out of the group, name the cause, ask the `FailurePolicy`
recover   other nodes for lost ones, or fewer (`ScalingPolicy`); back to start
finish    what came of it

A rank's process is a `Member`. Survivors keep theirs; a place that is empty is filled by a spare of its node, else by a
new process. The driver holds no state of the training; the ranks restore themselves from the newest of the nodes'
snapshots and the checkpoints in storage. Threads: all here is the main thread's.
"""

import enum
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import ray

from checkpoint.snapshots.roster import Roster
from launch import member as members
from launch.checks import Crew
from launch.failures import TEAM_FILE, Cause
from launch.ledger import Ledger
from launch.member import Member
from launch.options import LaunchOptions
from launch.places import Node, Places, draining, gone
from launch.policy import FailurePolicy, ScalingPolicy, by_itself
from launch.team import Team
from launch.worker import Event, Failed, Failure
from trainer.job import Job
from trainer.loggers import replace_file
from trainer.run import LeftBehind, run_id, run_path

REPLACE_S = 1.0
"""How long a node that takes the place of a lost one is waited for; then the job goes on with fewer."""
LOOK_S = 2.0
"""Between two looks for nodes that have come, or are to be claimed back."""
ORDER: tuple[Cause, ...] = ("node", "preemption", "process", "device", "numbers", "hang", "error")
"""What is taken for the cause where several things have failed."""
DEAD: tuple[Cause, ...] = ("node", "preemption", "process", "device", "hang")
"""After these a process is gone, or of no use: CUDA does not recover from an error within one."""
TAIL_BYTES = 64 << 10


class State(enum.Enum):
    ACQUIRE = "acquire"
    START = "start"
    TRAIN = "train"
    DIAGNOSE = "diagnose"
    RECOVER = "recover"
    FINISH = "finish"


class Supervisor:
    """Leaving the context ends all processes and gives the nodes back."""

    def __init__(
        self, scaling: ScalingPolicy, options: LaunchOptions, overrides: tuple[str, ...], show: Callable[[Event], None]
    ) -> None:
        self._scaling, self._options, self._overrides, self._show = scaling, options, overrides, show
        self.crew: Crew = scaling.wanted
        self._job: Job = scaling.config(self.crew).job()
        self._budget = FailurePolicy(options.max_failures, options.max_preemptions, self._job.train.rewinds)
        self._folder = run_path(self._job)
        self._ledger = Ledger(self._folder, self._say)
        self._places = Places(self.crew)
        self._nodes: list[Node] = []
        self._ranks: list[Member | None] = []
        """By rank; the ranks of a node one after another, in the order of `_nodes`."""
        self._devices: dict[tuple[Node, int], str] = {}
        """Of each place on a node, the GPU that belongs to it."""
        self._spares: list[Member] = []
        self._coming: list[Node] = []
        """Nodes that are ours, and whose processes still start."""
        self._leaving: set[Node] = set()
        self._unfit: set[Node] = set()
        """Nodes on which nothing of ours can start."""
        self._team: Team | None = None
        self._generation = 0
        self._left_behind = LeftBehind()
        self._looked = 0.0
        self._stop_reason: str | None = None
        self._stop_told = self._pausing = False
        self._spent: Failed | None = None
        """Why the job ends at the pause that was asked for."""
        self._outcome: dict[str, Any] | Failed | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in [*self._spares, *(member for member in self._ranks if member)]:
            ray.kill(member.actor)
        self._places.close()
        (self._folder / TEAM_FILE).unlink(missing_ok=True)

    def run(self, training: Callable[[], None]) -> dict[str, Any] | Failed:
        """Train to the end: what rank 0 returned, or the failure that was not recovered from. ValueError for what
        cannot work, before the first step; when training begins, `training` is called."""
        act = {
            State.ACQUIRE: self._acquire,
            State.START: self._start,
            State.TRAIN: self._train,
            State.DIAGNOSE: self._diagnose,
            State.RECOVER: self._recover,
        }
        state = State.ACQUIRE
        while state is not State.FINISH:
            state = act[state]()
            if state is State.TRAIN and self._generation == 1:
                training()
        assert self._outcome is not None
        return self._outcome

    def request_stop(self, reason: str) -> None:
        """Called by a signal handler, so it only leaves a note for `_tick`."""
        self._stop_reason = reason

    # ------------------------------------------------------------------------------------------------ the states

    def _acquire(self) -> State:
        self._nodes = self._places.take(self.crew.nodes, self._options.start_timeout_s)
        if len(self._nodes) < self.crew.nodes:
            raise ValueError(_occupied(self.crew, self._options.start_timeout_s))
        self._ranks = [None] * self.crew.workers
        return State.START

    def _start(self) -> State:
        self._generation += 1
        self._stop_told = self._pausing = False
        self._ledger.watched.starts()
        new = {node for node in self._nodes if not any(self._ranks_of(node))}
        ranks = [member or self._fill(rank) for rank, member in enumerate(self._ranks)]
        self._ranks = list(ranks)
        if self.crew.device == "cuda":  # there cores are left for their imports; on CPU the ranks compute with all
            self._keep_spares()
        self._team = team = Team(ranks, self.crew, self._options)
        if not team.assemble(self._job, self._overrides, self._roster, self._left_behind):
            if self._generation == 1:
                _complain(team)
            elif new != set(self._nodes):  # others have shown that the fault is not in what was asked for
                self._do_without(team, team.unfit & new)
            return State.DIAGNOSE
        for rank, member in enumerate(ranks):
            if member.devices:
                self._devices[self._place(rank)] = member.devices
        self._ledger.watched.times |= {"loaded": team.loaded_at, "joined": time.time()}
        self._write_team(ranks)
        return State.TRAIN

    def _train(self) -> State:
        assert self._team is not None
        if not self._team.watch(self._see, self._tick):
            return State.DIAGNOSE
        self._team.last_events(self._see)
        self._outcome = self._team.results[0]
        if self._outcome["status"] != "paused":
            return State.FINISH
        self._ledger.ended()
        self._ledger.watched.times["out"] = time.time()
        if self._spent:
            self._ledger.give_up()
            self._outcome = self._spent
            return State.FINISH
        return State.RECOVER

    def _diagnose(self) -> State:
        team, watched = self._team, self._ledger.watched
        assert team is not None
        watched.times = {"found": time.time()}
        last_sign = watched.last_sign
        team.leave(self._see)
        watched.step = max(watched.step, _logged_steps(self._folder / "metrics.jsonl"))
        self._ledger.ended()
        watched.times["out"] = time.time()
        for rank, failure in team.failures.items():
            if failure.kind in DEAD and not failure.symptom:
                self._ranks[rank] = None
                if failure.kind in ("hang", "device"):
                    members.end(team.members[rank])
        rank = min(team.failures, key=lambda rank: _precedence(team.failures[rank]))  # of equals the first found
        failure, node = by_itself(team.failures[rank], self._job.run.resume), team.members[rank].node
        self._ledger.failed(failure, rank, node.address, self.crew.workers, found_s=watched.times["found"] - last_sign)
        if failure.next_batch is not None:
            self._left_behind = replace(self._left_behind, batches_before=failure.next_batch)
        if failure.good_step is not None:
            self._left_behind = replace(self._left_behind, steps_after=failure.good_step)
        if why := self._budget.give_up(failure, watched.step, watched.moved):
            self._ledger.give_up()
            if failure.user and not watched.moved:
                raise _wrong(team, rank)
            self._outcome = Failed(rank=rank, node=node.address, failure=_with(failure, why))
            return State.FINISH
        if failure.kind == "hang" and failure.trace:
            self._say(failure.trace.rstrip())
        kept = sum(member is not None for member in self._ranks)
        self._say(f"rank {rank} on node {node.address}: {failure.cause}; {kept} of {len(self._ranks)} processes go on")
        return State.RECOVER

    def _recover(self) -> State:
        """Find the nodes to go on with. Who comes takes the places of who went: the others keep their ranks, and what
        lies in their nodes' memory."""
        assert self._team is not None
        silent = self._team.lost | gone({*self._nodes, *self._coming} - self._team.lost - self._leaving)
        lost = silent | self._unfit | self._leaving
        if self._nodes[0] in silent:  # where rank 0 was; cut off, it may live on
            self._left_behind = replace(self._left_behind, lingers=True)
        held = {node: self._ranks_of(node) for node in self._nodes if node not in lost}
        arrived = [node for node in self._coming if node not in lost]
        missing = self._scaling.wanted.nodes - len(held) - len(arrived)
        if missing > 0 and lost:
            arrived += self._places.take(missing, REPLACE_S, prefer={spare.node for spare in self._spares})
        nodes = [node if node in held else (arrived.pop(0) if arrived else None) for node in self._nodes]
        there = [node for node in nodes if node is not None] + arrived
        if (crew := self._scaling.crew(len(there))) is None:
            wait_s = self._options.start_timeout_s
            self._say(f"no nodes are left to go on with: waiting {wait_s:g} s for others (launch.start_timeout_s)")
            missing = self._scaling.wanted.nodes - len(there)
            there += self._places.take(missing, wait_s, go_on=lambda: self._stop_reason is None)
            if (crew := self._scaling.crew(len(there))) is None:
                self._ledger.give_up()
                self._outcome = self._without_nodes()
                return State.FINISH
        keep = there[: crew.nodes]
        for node in {*self._nodes, *self._coming, *there} - set(keep):
            self._drop(node, lost=node in silent | self._unfit)
        if crew != self.crew:
            self._say(f"going on with {crew.workers} ranks on {crew.nodes} nodes, after {self.crew.workers} ranks")
        self._ranks = [member for node in keep for member in held.get(node, [None] * crew.per_node)]
        self._nodes, self._coming, self._leaving, self.crew = keep, [], set(), crew
        self._job = self._resuming(self._scaling.config(crew).job())
        return State.START

    def _without_nodes(self) -> dict[str, Any] | Failed:
        if self._stop_reason is None:
            return Failed(rank=0, node="none", failure=Failure(cause="no nodes are left", kind="node"))
        self._say(f"stopped ({self._stop_reason}) with no nodes; the same command goes on from the last checkpoint")
        return {"type": "end", "status": "stopped", "step": self._ledger.watched.step}

    # ------------------------------------------------------------------------------------------------ places

    def _place(self, rank: int) -> tuple[Node, int]:
        return self._nodes[rank // self.crew.per_node], rank % self.crew.per_node

    def _ranks_of(self, node: Node) -> list[Member | None]:
        first = self._nodes.index(node) * self.crew.per_node
        return self._ranks[first : first + self.crew.per_node]

    def _fill(self, rank: int) -> Member:
        """A process for a place that is empty: a spare of that node, else a new one. A place whose GPU is known lends
        it to whoever comes; for another one Ray chooses the GPU."""
        node, _ = self._place(rank)
        devices = self._devices.get(self._place(rank))
        own_gpu = self.crew.device == "cuda" and devices is None
        member = next((spare for spare in self._spares if (spare.node, spare.own_gpu) == (node, own_gpu)), None)
        if member is None:
            member = self._new(node, own_gpu=own_gpu)
        else:
            self._spares.remove(member)
        member.devices = devices
        return member

    def _new(self, node: Node, *, own_gpu: bool = False) -> Member:
        return members.start(node, self._places.options(node), self.crew, self._options, own_gpu=own_gpu)

    def _do_without(self, team: Team, nodes: set[Node]) -> None:
        """No rank is started on `nodes` any more: what failed there is theirs, and other nodes go on."""
        self._unfit |= nodes
        for rank, failure in team.failures.items():
            if (node := team.members[rank].node) in nodes:
                cause = f"node {node} is done without: {failure.cause}"
                team.failures[rank] = replace(failure, cause=cause, kind="node", user=False)
                ray.kill(team.members[rank].actor)

    def _drop(self, node: Node, *, lost: bool) -> None:
        """Nothing of ours stays on `node`. lost: it is not there any more."""
        for member in [*self._spares, *(member for member in self._ranks if member)]:
            if member.node == node:
                ray.kill(member.actor)
        self._spares = [spare for spare in self._spares if spare.node != node]
        self._ranks = [None if member and member.node == node else member for member in self._ranks]
        self._devices = {place: gpu for place, gpu in self._devices.items() if place[0] != node}
        self._places.give_back(node, lost=lost)

    def _resuming(self, job: Job) -> Job:
        """What the user said of where to begin has been done: from now on it is the newest step of this run. Where he
        went back to an earlier one, later ones that are still in storage are none of it."""
        asked = self._scaling.config(self._scaling.wanted).run.resume
        if asked.isdigit() and self._ledger.watched.restored_once:
            self._left_behind = replace(self._left_behind, steps_after=self._ledger.watched.step)
        elif asked.isdigit():
            return replace(job, run=replace(job.run, resume=asked))
        return replace(job, run=replace(job.run, resume="auto"))

    def _roster(self, go_on: Callable[[], bool]) -> Roster | None:
        """The snapshot processes of our nodes, started while `go_on`. On a machine of our own the first rank starts
        one."""
        if self._options.address is None or not self._job.checkpoint.snapshots:
            return None
        from checkpoint.snapshots.actors import start_snapshot_processes

        rank_nodes = [rank // self.crew.per_node for rank in range(self.crew.workers)]
        hold_s = self._job.checkpoint.snapshot_hold_s
        nodes = [node.id for node in self._nodes]
        return start_snapshot_processes(run_id(self._job), nodes, rank_nodes, hold_s=hold_s, say=self._say, go_on=go_on)

    # ------------------------------------------------------------------------------------------------ between whiles

    def _see(self, event: Event) -> None:
        self._ledger.see(event, self.crew.workers)
        if event["type"] == "step":  # the snapshot taken before it has it
            self._left_behind = replace(self._left_behind, batches_before=None)
        self._show(event)

    def _tick(self) -> None:
        assert self._team is not None
        if self._stop_reason and not self._stop_told:
            self._stop_told = True
            self._team.request_stop(self._stop_reason, self._ledger.watched.step_s)
        if time.monotonic() < self._looked + LOOK_S or not self._ledger.watched.stepped:
            return  # a start on CPU is not slowed down by the imports of others
        self._looked = time.monotonic()
        if self._options.address is not None and not self._pausing:
            self._look_for_preemptions()
            self._look_for_nodes()
        self._keep_spares()

    def _look_for_preemptions(self) -> None:
        assert self._team is not None
        ids = draining()
        self._leaving = {node for node in self._nodes if node.id in ids}
        if not self._leaving:
            return
        self._pausing = True
        self._ledger.watched.times = {"found": time.time()}
        for node in self._leaving:
            failure = Failure(cause=f"node {node} is to be taken away", kind="preemption")
            self._ledger.failed(failure, None, node.address, self.crew.workers, found_s=0.0)
            self._say(failure.cause)
            if why := self._budget.give_up(failure, self._ledger.watched.step, True):
                self._spent = Failed(rank=0, node=node.address, failure=_with(failure, why))
        parity = self._job.checkpoint.parity
        self._team.request_pause(persist=len(self._leaving) > (1 if parity is None else parity))

    def _look_for_nodes(self) -> None:
        """Grow again: the processes of new nodes start beside the training, which pauses once they are ready."""
        assert self._team is not None
        missing = self._scaling.wanted.nodes - self.crew.nodes
        if self._coming:
            there = [spare for spare in self._spares if spare.node in self._coming]
            waiting = [spare.loaded for spare in there]
            if not waiting or len(ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]) < len(waiting):
                return
            faults = {spare.node: fault for spare in there if (fault := members.fault_of(spare))}
            for node, fault in faults.items():
                self._say(f"node {node} is done without: {fault}")
                self._coming.remove(node)
                self._drop(node, lost=True)
            if self._coming:
                self._pausing = True
                self._ledger.watched.times = {"found": time.time()}
                self._team.request_pause()
        elif missing and (free := len(self._places.free())):
            crew = self._scaling.crew(self.crew.nodes + min(missing, free))
            assert crew is not None
            taken = self._places.take(crew.nodes - self.crew.nodes, 0.0)
            if self._scaling.crew(self.crew.nodes + len(taken)) == self.crew:  # others were faster
                for node in taken:
                    self._places.give_back(node)
                return
            for node in taken:
                self._coming.append(node)
                for _ in range(crew.per_node - sum(spare.node == node for spare in self._spares)):
                    self._spares.append(self._new(node, own_gpu=crew.device == "cuda"))

    def _keep_spares(self) -> None:
        """On each node what `launch.spares` says, and on one more node, if there is a free one, as many as it would
        need to take the place of another. Where a node's GPUs are not known before they are ours it has none ready."""
        count = self._options.spares
        count = int(self._job.checkpoint.snapshots) if count is None else count
        wanted = dict.fromkeys(self._nodes, count)
        if count and self._options.address is not None and self.crew.device == "cpu":
            free = self._places.free()
            warm = [node for node in free if any(spare.node == node for spare in self._spares)]
            wanted |= dict.fromkeys((warm or free)[:1], self.crew.per_node)
        for spare in [spare for spare in self._spares if spare.node not in {*wanted, *self._coming}]:
            ray.kill(spare.actor)
            self._spares.remove(spare)
        for node, number in wanted.items():
            for _ in range(number - sum(spare.node == node for spare in self._spares)):
                self._spares.append(self._new(node))

    # ------------------------------------------------------------------------------------------------ what is said

    def _say(self, text: str) -> None:
        self._show({"type": "message", "text": text})

    def _write_team(self, ranks: list[Member]) -> None:
        tree = {
            "version": 1,
            "driver_pid": os.getpid(),
            "driver_host": socket.gethostname(),
            "ray_address": ray.get_runtime_context().gcs_address,
            "generation": self._generation,
            "ranks": [
                {"rank": rank, "node_id": member.node.id, "address": member.node.address, "pid": member.pid}
                for rank, member in enumerate(ranks)
            ],
            "nodes": [{"node_id": node.id, "address": node.address} for node in self._nodes],
        }
        replace_file(self._folder / TEAM_FILE, json.dumps(tree, indent=1))


def _precedence(failure: Failure) -> tuple[bool, int]:
    return failure.symptom, ORDER.index(failure.kind)


def _with(failure: Failure, why: str) -> Failure:
    return replace(failure, cause=f"{failure.cause} (not recovered from: {why})")


def _complain(team: Team) -> None:
    """ValueError where a first start failed for what was asked for, or came too late: no try would be better."""
    for rank, failure in sorted(team.failures.items()):
        if failure.user or failure.kind == "hang":
            raise _wrong(team, rank)


def _wrong(team: Team, rank: int) -> ValueError:
    return ValueError(f"rank {rank} on node {team.members[rank].node.address}: {team.failures[rank].cause}")


def _logged_steps(metrics: Path) -> int:
    """How many steps the run's log says are done: rank 0 may have died with what it had to tell."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
            for line in reversed(file.read().splitlines()):
                try:
                    return int(json.loads(line)["step"]) + 1
                except (ValueError, KeyError, TypeError):
                    continue  # torn by the kill
    except OSError:
        pass
    return 0


def _occupied(crew: Crew, timeout_s: float) -> str:
    free = ray.available_resources()
    return (
        f"launch.workers={crew.workers} on launch.nodes={crew.nodes} found no room within "
        f"launch.start_timeout_s={timeout_s:g}: other jobs hold the cluster; "
        f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free in all"
    )
