"""``atoll submit slurm|ssh|kuberay``: what a cluster needs to run a job and run it again, rendered and handed over.

The scripts are plain bash, kept in ``<run folder>/submit/``: one settings block, the transport (``templates/slurm.sh``
or ``ssh.sh``) and what both do (``templates/cluster.sh``). The manifest is a RayJob of KubeRay. What runs on the nodes
is `launch.node`. The job itself is composed and checked here first, so that a misspelled key is answered now and not
when the queue has been waited for.
"""

import argparse
import importlib.resources
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch.kuberay import kuberay
from launch.submission import RUNS, Submission, Target, check_label

if TYPE_CHECKING:
    from launch.config import Config

USAGE = """\
atoll submit slurm   --nodes 4 --gpus-per-node 8 --time 24:00:00 [--partition P] [--account A] ... -- key=value ...
atoll submit ssh     --hosts a,b,c --gpus-per-node 8 [--user U] ... -- key=value ...
atoll submit kuberay --nodes 4 --gpus-per-node 8 --image IMG --pvc CLAIM [--namespace N] ... -- key=value ...
--dry-run shows what would be written and run, and does neither; atoll submit slurm --help lists all options"""

OURS = ("launch.address", "launch.nodes")
"""Overrides that follow from the options here."""
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


def parse(args: list[str]) -> Target:
    """Read the command line. ValueError, one sentence, for what cannot be meant."""
    typed, overrides = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    options = _parser().parse_args(typed)
    if not options.kind:
        raise ValueError(f"choose slurm, ssh or kuberay\n{USAGE}")
    _check(options)
    if options.kind == "ssh":
        options.nodes = len(options.hosts)
    return Target(options.kind, options, _complete(options, overrides))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the options, and the job's key=value come after --")


def _parser() -> argparse.ArgumentParser:
    top = _Parser(prog="atoll submit", usage=USAGE, allow_abbrev=False)
    kinds = top.add_subparsers(dest="kind", prog=top.prog, parser_class=_Parser)
    slurm, ssh, kuberay = (kinds.add_parser(kind, allow_abbrev=False) for kind in ("slurm", "ssh", "kuberay"))
    for parser in (slurm, kuberay):
        parser.add_argument("--nodes", type=int, required=True, help="nodes, each taken whole")
    for parser in (slurm, ssh, kuberay):
        parser.add_argument("--gpus-per-node", type=int, default=0, help="0: train on CPUs")
        parser.add_argument("--max-restarts", type=int, default=3, help="failures in a row that are tried again")
        parser.add_argument("--wait-s", type=float, default=300.0, help="longest wait for all nodes to join")
        parser.add_argument("--dry-run", action="store_true", help="show what would be written and run; do neither")
    for parser in (slurm, ssh):
        parser.add_argument("--cpus-per-node", type=int, default=0, help="0: those the job may use")
        parser.add_argument("--interface", default="", help="network interface that Ray uses (default: the route's)")
        parser.add_argument("--python", default=sys.executable, help="Python with atoll, on every node")
        parser.add_argument("--folder", default=os.getcwd(), help="working folder, on every node")
    slurm.add_argument("--time", required=True, help="time limit of one turn in the queue, as for sbatch")
    slurm.add_argument("--partition")
    slurm.add_argument("--account")
    slurm.add_argument("--name", help="the job's name (default: the run's)")
    slurm.add_argument("--signal-s", type=int, default=120, help="seconds before the time limit to write a checkpoint")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="another, as --sbatch=--qos=high"
    )
    ssh.add_argument("--hosts", type=lambda text: text.split(","), required=True, help="the first is the head")
    ssh.add_argument("--user", default="")
    ssh.add_argument("--ssh", action="append", default=[], metavar="OPTION", help="for ssh, as --ssh=-p2222")
    kuberay.add_argument("--python", default="python3", help="Python with atoll, in the image")
    kuberay.add_argument("--image", required=True, help="image with atoll and Ray")
    kuberay.add_argument("--name", help="the RayJob's name (default: the run's)")
    kuberay.add_argument("--namespace", default="default")
    kuberay.add_argument("--pvc", help=f"claim for the runs, ReadWriteMany, mounted at {RUNS}")
    kuberay.add_argument("--cpus-per-node", type=int, default=8, help="CPU cores a worker pod asks for")
    kuberay.add_argument("--memory-per-node", default="64Gi", help="memory a worker pod asks for, with --shm")
    kuberay.add_argument("--shm", default="16Gi", help="a worker pod's /dev/shm: snapshots, state on the host")
    return top


def _check(options: argparse.Namespace) -> None:
    least = {"nodes": 1, "gpus_per_node": 0, "cpus_per_node": 0, "max_restarts": 0, "wait_s": 1, "signal_s": 1}
    for name, smallest in least.items():
        value = getattr(options, name, smallest)
        if value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least {smallest}")
    if options.kind == "ssh":
        wrong = [host for host in options.hosts if not HOST.fullmatch(host)]
        if wrong:
            raise ValueError(f"--hosts {wrong[0]!r}: write names or addresses, as a,b,c; the user goes to --user")
        if len(set(options.hosts)) < len(options.hosts):
            raise ValueError(f"--hosts {','.join(options.hosts)}: each host once")
    if options.kind == "slurm":
        for option in options.sbatch:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"--sbatch {option!r}: write an option of sbatch, as --sbatch=--qos=high")
    if options.kind == "kuberay":
        for name in ("memory_per_node", "shm"):
            if not re.fullmatch(r"[1-9][0-9]*(Mi|Gi|Ti)", getattr(options, name)):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: write a size as 64Gi")
        for name in ("name", "namespace"):
            check_label(f"--{name}", getattr(options, name))


def _complete(options: argparse.Namespace, overrides: list[str]) -> list[str]:
    """The overrides, with what follows from the options. ValueError for what is no key=value, or contradicts them."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or key.startswith("-") or "\0" in override:
            raise ValueError(f"{override!r} after --: write key=value")
        if key.lstrip("+~") in OURS:
            raise ValueError(f"{override}: leave it out, it follows from the options of atoll submit {options.kind}")
    given = {override.partition("=")[0] for override in overrides}
    workers = options.nodes * max(1, options.gpus_per_node)
    ours = {"launch.nodes": options.nodes, "launch.workers": workers}
    if not options.gpus_per_node:
        ours["launch.device"] = "cpu"
    if options.kind == "kuberay" and options.pvc:
        ours["run.root"] = RUNS
    return [f"{key}={value}" for key, value in ours.items() if key not in given] + overrides


def send(target: Target, config: "Config") -> int:
    """Write and hand over, or with ``--dry-run`` print both; the exit code. ValueError where that cannot work."""
    _check_job(target, config)
    render: dict[str, Callable[[Target, Config], Submission]] = {"slurm": slurm, "ssh": ssh, "kuberay": kuberay}
    made = render[target.kind](target, config)
    for note in made.notes:
        print(f"atoll submit: {note}", file=sys.stderr)
    if target.options.dry_run:
        print(f"# would write {made.file}:\n{made.text}\n# would run: {shlex.join(made.command)}")
        return 0
    needed = "ssh" if target.kind == "ssh" else made.command[0]
    if shutil.which(needed) is None:
        raise ValueError(
            f"atoll submit {target.kind} needs {needed}, which is not here: run this where it is, "
            f"or see with --dry-run what it would be given"
        )
    try:
        made.file.parent.mkdir(parents=True, exist_ok=True)
        made.file.with_name("failures").unlink(missing_ok=True)  # those of an earlier submission
        made.file.write_text(made.text)
    except OSError as error:
        raise ValueError(f"{made.file} cannot be written ({error.strerror}); change run.root=") from error
    print(f"atoll submit: {made.file}\natoll submit: {shlex.join(made.command)}", flush=True)
    if target.kind == "ssh":
        os.execvp(made.command[0], made.command)  # the script is told of signals as this command would be
    return int(subprocess.run(made.command).returncode != 0)


def _check_job(target: Target, config: "Config") -> None:
    """ValueError for options that the driver would refuse, of those that it need not be on the cluster to know."""
    from launch.checks import Crew, check_options

    if config.parallel.placement == "auto" or (config.machine and not config.parallel.levels):
        return  # the levels are of a machine whose file may lie there
    workers = config.launch.workers
    assert workers is not None, "_complete gave it"
    check_options(config, Crew(workers, config.launch.nodes, "cuda" if target.options.gpus_per_node else "cpu"))


def slurm(target: Target, config: "Config") -> Submission:
    """The batch script, and sbatch for it."""
    options, state = target.options, _state_folder(target, config)
    name = options.name or config.run_name
    wanted = {
        "job-name": name,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus_per_node or None,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "chdir": options.folder,
        "output": f"{state}/slurm-%j.log",
        "open-mode": "append",
        "signal": f"B:TERM@{options.signal_s}",
    }
    lines = [_directive(key, str(value)) for key, value in wanted.items() if value is not None]
    lines += ["#SBATCH --exclusive", "#SBATCH --mem=0", "#SBATCH --requeue"]
    lines += [f"#SBATCH {option}" for option in options.sbatch]
    text = _script(target, state, lines)
    return Submission(state / "slurm.sh", text, ["sbatch", str(state / "slurm.sh")])


def _directive(key: str, value: str) -> str:
    if re.search(r'["\\\n]', value) or ("%" in value and key != "output") or value.count("%") > 1:
        raise ValueError(
            f'{key} of the job, {value!r}: sbatch reads ", \\, % and line breaks in its own way; choose another'
        )
    return f'#SBATCH --{key}="{value}"' if re.search(r"[\s#']", value) else f"#SBATCH --{key}={value}"


def ssh(target: Target, config: "Config") -> Submission:
    """The script that starts the job over ssh and stays with it."""
    options, state = target.options, _state_folder(target, config)
    extra = [*(["-l", options.user] if options.user else []), *options.ssh]
    settings = {"hosts": options.hosts, "folder": options.folder, "ssh_options": extra}
    text = _script(target, state, [], settings)
    return Submission(state / "ssh.sh", text, ["bash", str(state / "ssh.sh")])


def _state_folder(target: Target, config: "Config") -> Path:
    from trainer.run import run_path

    return Path(target.options.folder, run_path(config.job())).absolute() / "submit"


def _script(target: Target, state: Path, directives: list[str], more: dict[str, Any] | None = None) -> str:
    options = target.options
    settings = {
        "python": options.python,
        "state": str(state),
        "gpus": options.gpus_per_node,
        "cpus": options.cpus_per_node,
        "interface": options.interface,
        "wait_s": f"{options.wait_s:g}",
        "max_restarts": options.max_restarts,
        "overrides": target.overrides,
    } | (more or {})
    head = ["#!/bin/bash", *directives, f"# Written by atoll submit {target.kind}. Running it again goes on.", ""]
    lines = [f"{name}={_bash(value)}" for name, value in settings.items()]
    body = [
        (importlib.resources.files("launch") / "templates" / f"{name}.sh").read_text()
        for name in (target.kind, "cluster")
    ]
    return "\n".join([*head, *lines, "", *body])


def _bash(value: Any) -> str:
    if isinstance(value, list):
        return f"({' '.join(shlex.quote(item) for item in value)})"
    return shlex.quote(str(value))
