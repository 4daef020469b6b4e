"""``atoll chaos``: breaks a job that is running, on purpose, to see it recover.

It reads who trains the run from ``team.json`` of its folder, hits processes, memory or files, says what it did, and
keeps that in ``chaos.jsonl`` beside it. What is on this machine it hits itself; on another node, a small task that Ray
pins there. It never asks the job: a job in trouble is just what it is for.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launch.nodes import kill_process, on_node
from launch.runs import find_run, is_running, parse, read_team
from trainer.timeline import append_line

KINDS = ("worker", "node", "hang", "corrupt", "disk")
FILE = "chaos.jsonl"
SHARED = Path("/dev/shm")
ENDS_S = 5.0
"""How long a killed process may take to be gone."""
REMADE_S = 30.0
"""How long a team that is just being made anew is waited for."""
USAGE = """\
atoll chaos kill=worker|node|hang|corrupt|disk [run.name=<run>] [run.root=runs]
            [rank=<number>] [node=<number or id>] [seed=<number>] [after_s=0] [every_s=10] [count=1] [yes=true]

  worker   SIGKILL to the process of a rank
  node     SIGKILL to a node's raylet and every process under it; its shared memory goes too, as with a machine
  hang     SIGSTOP to the process of a rank
  corrupt  one bit of a snapshot in a node's shared memory is flipped
  disk     one byte of the newest checkpoint in storage is changed for good; needs yes=true

Without rank= or node= one is drawn by seed=. A fault comes after after_s seconds, then every every_s, count in all."""


class BeingMade(ValueError):
    """Whom the fault was meant for is gone: the team is just being made anew."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    kill: str
    folder: Path
    rank: int | None
    node: str | None
    seed: int
    draw: random.Random
    after_s: float
    every_s: float
    count: int


def chaos(args: list[str], say: Callable[[str], None] = print) -> str:
    """Make the faults that `args` ask for; returns a last word. ValueError for what cannot be done, before it is."""
    plan = parse_plan(args)
    _team(plan.folder)
    time.sleep(plan.after_s)
    for number in range(plan.count):
        if number:
            time.sleep(plan.every_s)
        say(_strike_once_made(plan))
    made = f"{plan.count} fault{'s' if plan.count > 1 else ''} made (seed={plan.seed})"
    return f"{made}; what came of it: atoll report run.root={plan.folder.parent} run.name={plan.folder.name}"


def parse_plan(args: list[str]) -> Plan:
    keys = ("kill", "run.name", "run.root", "rank", "node", "seed", "after_s", "every_s", "count", "yes")
    given = parse(args, keys, USAGE)
    kill = given.get("kill", "")
    if kill not in KINDS:
        raise ValueError(f"kill={kill}: choose one of {', '.join(KINDS)}\n{USAGE}")
    if "rank" in given and kill not in ("worker", "hang"):
        raise ValueError(f"rank= is not read with kill={kill}; {'node= chooses' if kill != 'disk' else 'leave it out'}")
    if "node" in given and kill not in ("node", "corrupt"):
        raise ValueError(f"node= is not read with kill={kill}; {'rank= chooses' if kill != 'disk' else 'leave it out'}")
    if kill == "disk" and given.get("yes") != "true":
        raise ValueError("kill=disk damages a checkpoint in storage for good: say yes=true if that is what you want")
    numbers: dict[str, float] = {}
    for key, least in (("rank", 0), ("seed", 0), ("after_s", 0), ("every_s", 0), ("count", 1)):
        try:
            numbers[key] = float(given[key]) if key in given else -1.0
        except ValueError:
            raise ValueError(f"{key}={given[key]}: must be a number") from None
        whole = key in ("rank", "seed", "count") and not numbers[key].is_integer()
        if key in given and (numbers[key] < least or whole):
            raise ValueError(f"{key}={given[key]}: must be {'a whole number' if whole else f'{least} or more'}")
    seed = int(numbers["seed"]) if "seed" in given else random.randrange(1 << 16)
    return Plan(
        kill=kill,
        folder=find_run(given.get("run.root", "runs"), given.get("run.name")),
        rank=int(numbers["rank"]) if "rank" in given else None,
        node=given.get("node"),
        seed=seed,
        draw=random.Random(seed),
        after_s=max(0.0, numbers["after_s"]),
        every_s=numbers["every_s"] if "every_s" in given else 10.0,
        count=int(numbers["count"]) if "count" in given else 1,
    )


def _strike_once_made(plan: Plan) -> str:
    """`strike`, again where the team was just being made anew, for up to `REMADE_S`."""
    deadline = time.monotonic() + REMADE_S
    while True:
        try:
            return strike(plan)
        except BeingMade:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def strike(plan: Plan) -> str:
    """Make one fault, and tell and keep what was done."""
    team = _team(plan.folder)
    act = {"worker": _signal_rank, "hang": _signal_rank, "node": _kill_node, "corrupt": _corrupt, "disk": _damage}
    done = act[plan.kill](plan, team)
    append_line(plan.folder / FILE, {"time": time.time(), "kill": plan.kill, **done})
    return f"{time.strftime('%H:%M:%S')} {plan.kill}: {done['what']}"


def _team(folder: Path) -> dict[str, Any]:
    team = read_team(folder)
    if team is None and is_running(folder):
        raise ValueError(
            f"run.name={folder.name} has no team: it is still starting, or has one worker, whose process "
            f"{folder / 'run.lock'} names"
        )
    if team is None:
        raise ValueError(f"run.name={folder.name} in run.root={folder.parent} is not being trained: start it first")
    return team


# ---------------------------------------------------------------------------------------------------- whom to hit


def _rank(plan: Plan, team: dict[str, Any]) -> dict[str, Any]:
    ranks = team["ranks"]
    if plan.rank is None:
        chosen: dict[str, Any] = plan.draw.choice(ranks)
        return chosen
    if plan.rank >= len(ranks):
        raise ValueError(f"rank={plan.rank}: the run has ranks 0 to {len(ranks) - 1}")
    return next(rank for rank in ranks if rank["rank"] == plan.rank)


def _node(plan: Plan, team: dict[str, Any], spared: str | None = None) -> dict[str, Any]:
    """A node of the team; `spared` is none to be drawn."""
    nodes = team["nodes"]
    if plan.node is None:
        free = [node for node in nodes if node["node_id"] != spared]
        if not free:
            raise ValueError(
                "the only node of the run is the head of the Ray cluster, without which there is none; a run on "
                "several has launch.address and launch.nodes"
            )
        chosen: dict[str, Any] = plan.draw.choice(free)
        return chosen
    if plan.node.isdigit() and int(plan.node) < len(nodes):
        return dict(nodes[int(plan.node)])
    found = [node for node in nodes if len(plan.node) >= 6 and node["node_id"].startswith(plan.node)]
    if len(found) != 1:
        there = ", ".join(f"{number}: {node['node_id'][:12]} {node['address']}" for number, node in enumerate(nodes))
        raise ValueError(f"node={plan.node}: the run has nodes {there}")
    return dict(found[0])


def _raylet(node_id: str) -> psutil.Process | None:
    """The raylet of a node, where it runs on this machine."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and f"--node_id={node_id}" in (process.info["cmdline"] or ()):
            return process
    return None


def _head_here(team: dict[str, Any]) -> str | None:
    """The node that is the head of the cluster, where it is on this machine."""
    for node in team["nodes"]:
        raylet = _raylet(node["node_id"])
        if raylet is not None and any("node:__internal_head__" in word for word in raylet.cmdline()):
            return str(node["node_id"])
    return None


def _there(team: dict[str, Any], node: dict[str, Any], act: Callable[..., Any], *args: Any) -> Any:
    """Do `act` on the node: at once where it is on this machine, else through Ray."""
    if _raylet(node["node_id"]) is not None:
        return act(*args)
    import ray

    from launch.cluster import QUIET

    if not ray.is_initialized():
        ray.init(address=team["ray_address"], **QUIET)
    try:
        return on_node(node["node_id"], act, *args)
    except ray.exceptions.RayError as error:
        raise ValueError(f"node {node['address']} could not be reached: {str(error).splitlines()[0]}") from error


# ---------------------------------------------------------------------------------------------------- what is done


def _signal_rank(plan: Plan, team: dict[str, Any]) -> dict[str, Any]:
    rank, number = _rank(plan, team), signal.SIGSTOP if plan.kill == "hang" else signal.SIGKILL
    pid, where = rank["pid"], f"rank {rank['rank']} (pid {rank['pid']} on node {rank['address']})"
    if not _there(team, rank, _signal_worker, pid, int(number)):
        raise BeingMade(f"{where} is not there any more: the team is just being made anew, try again")
    return {"rank": rank["rank"], "node": rank["address"], "pid": pid, "what": f"{number.name} to {where}"}


def _signal_worker(pid: int, number: int) -> bool:
    """On its node; False where the process has ended, and the number may be another's."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE or not process.name().startswith("ray::"):
            return False
    except psutil.NoSuchProcess:
        return False
    struck = kill_process(pid, number)
    if number == signal.SIGKILL:  # the next fault must not hit it on its way out
        with suppress(psutil.TimeoutExpired):
            process.wait(ENDS_S)
    return struck


def _kill_node(plan: Plan, team: dict[str, Any]) -> dict[str, Any]:
    head = _head_here(team)
    node = _node(plan, team, spared=head)
    if node["node_id"] == head:
        raise ValueError(
            f"node={plan.node} is the head of the Ray cluster, without which there is none; choose another"
        )
    held = [rank["rank"] for rank in team["ranks"] if rank["node_id"] == node["node_id"]]
    run = (plan.folder / "run.id").read_text()
    if _raylet(node["node_id"]) is not None:
        killed = kill_node(node["node_id"], run)
    else:
        killed = _kill_far_node(team, node, run)
    who = f"ranks {', '.join(map(str, held))}" if held else "no rank"
    what = f"SIGKILL to {killed} of node {node['node_id'][:12]} ({node['address']}), which held {who}"
    return {
        "rank": held[0] if len(held) == 1 else None,
        "node": node["address"],
        "node_id": node["node_id"],
        "what": what,
    }


def _kill_far_node(team: dict[str, Any], node: dict[str, Any], run: str) -> str:
    try:
        _there(team, node, kill_node, node["node_id"], run)
    except ValueError:  # the task's own process went with the node, so it cannot answer
        return "the raylet and the processes"
    return "the processes"


def kill_node(node_id: str, run: str) -> str:
    """On the node: SIGKILL to its raylet and all below, and its memory is gone; the process that calls it goes last."""
    raylet = _raylet(node_id)
    if raylet is None:
        raise ValueError(f"node {node_id[:12]} has no raylet any more")
    below = raylet.children(recursive=True)
    raylet.kill()
    for process in below:
        if process.pid != os.getpid():
            kill_process(process.pid)
    for file in SHARED.glob(f"atoll-{run}-{node_id[:12]}-*"):
        file.unlink(missing_ok=True)
    if os.getpid() in [process.pid for process in below]:
        os._exit(1)
    return f"the raylet and {len(below)} processes"


def _corrupt(plan: Plan, team: dict[str, Any]) -> dict[str, Any]:
    node, run = _node(plan, team), (plan.folder / "run.id").read_text()
    alone = len(team["nodes"]) == 1
    what = _there(team, node, flip_bit, run, "" if alone else node["node_id"][:12], plan.draw.randrange(1 << 62))
    return {"rank": None, "node": node["address"], "what": what}


def flip_bit(run: str, label: str, drawn: int) -> str:
    """On the node: flip one bit, which `drawn` chooses, of the newest version in its segment."""
    from checkpoint.snapshots.segment import Segment
    from checkpoint.snapshots.segment_files import SegmentError

    for file in sorted(SHARED.glob(f"atoll-{run}-{label}*")):
        if file.suffix == ".door":
            continue
        try:
            segment = Segment.open(file)
        except (SegmentError, OSError):
            continue
        try:
            versions = segment.committed()
            if versions:
                payload = versions[0].payload
                place, bit = drawn // 8 % len(payload), drawn % 8
                payload[place] ^= 1 << bit
                del payload
                version = f"version {versions[0].version}, step {versions[0].step}"
                return f"flipped bit {bit} of byte {place} of the snapshot in {file} ({version})"
        finally:
            segment.close()
    raise ValueError(
        "kill=corrupt: this node holds no snapshot of the run yet; it needs checkpoint.snapshot_every_steps, and a step"
    )


def _damage(plan: Plan, team: dict[str, Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(OmegaConf.load(plan.folder / "config.yaml"))
    url = config["checkpoint"]["url"] or str(plan.folder / "checkpoints")
    if "://" in url.removeprefix("file://"):
        raise ValueError(f"kill=disk: checkpoint.url={url} is no folder; damage an object there by hand")
    committed = sorted(file.parent for file in Path(url.removeprefix("file://")).glob("step-*/COMMIT"))
    files = sorted(file for file in committed[-1].glob("shards/*/*/c/*") if file.stat().st_size) if committed else []
    if not files:
        raise ValueError(f"kill=disk: {url} holds no checkpoint yet; set checkpoint.every_steps")
    chosen = plan.draw.choice(files)
    place = plan.draw.randrange(chosen.stat().st_size)
    with chosen.open("r+b") as file:
        file.seek(place)
        old = file.read(1)[0]
        file.seek(place)
        file.write(bytes([old ^ 0xFF]))
    return {"rank": None, "node": None, "what": f"byte {place} of {chosen} was {old}, is {old ^ 0xFF}"}
