"""The command ``atoll``: errors in what was typed come from here, on one line, before torch is imported.

Exit codes: 0 done, or stopped by the user with Ctrl-C; 1 the job failed; 2 what was typed or configured is wrong, also
where only a worker could find it, before the first step; 75 (``EX_TEMPFAIL``) told to stop by SIGTERM, resumable by the
same command, at whatever moment; 130 killed by a second Ctrl-C, or by one before training began.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from launch import EXIT_RESUMABLE, __version__, names

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from launch.config import Config

    Act = Callable[[Config, list[str]], int]

EXPORT_USAGE = "atoll export run=<folder or name> to=<new folder> [step=<number>] [dtype=fp32|bf16]"
USAGE = f"""\
atoll train [key=value ...]     train; the same command again resumes
atoll train --help              all presets and keys
atoll plan [key=value ...]      will it fit, how long is a step, what limits it: on machine=NAME, without that machine
{EXPORT_USAGE}
                                write a checkpoint as a folder of safetensors that transformers loads
atoll submit slurm|ssh|kuberay ... -- [key=value ...]
                                train on several machines; --help and --dry-run
atoll report [run.name=NAME]    every failure of a run, and where its time went
atoll chaos kill=worker|node|hang|corrupt|disk [run.name=NAME ...]
                                break a running job on purpose; --help
atoll --version"""

WRONG = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and leave the process with its exit code."""
    try:
        try:
            code: str | int | None = _run_command(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as left:  # of argparse
            code = left.code
        print(end="", flush=True)  # what is left for the interpreter's end fails where nobody catches it
    except BrokenPipeError:  # who reads has seen enough: atoll train --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    except KeyboardInterrupt:  # before the driver listens, or in a command that only looks
        code = INTERRUPTED
    sys.exit(code)


def _run_command(args: list[str]) -> int:
    command, rest = (args[0], args[1:]) if args else ("--help", [])
    if fault := names.find_fault():
        return _complain(fault)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "plan": plan,
        "export": export,
        "submit": submit,
        "report": report,
        "chaos": chaos,
    }
    if command in commands:
        return commands[command](rest)
    if command in ("--help", "-h", "help"):
        print(USAGE)
        return 0
    if command in ("--version", "version"):
        print(f"atoll {__version__}")
        return 0
    return _complain(f"there is no command {command!r}\n{USAGE}")


def train(args: list[str]) -> int:
    """Compose the config, check it, run it (or each of a sweep), and return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_RESUMABLE))  # until the driver listens; nothing is begun
    return _composed(args, _run)


def plan(args: list[str]) -> int:
    """Compose the config and print what it takes on the machine that it names; the exit code."""
    return _composed(args, _plan)


def _composed(args: list[str], act: "Act") -> int:
    """Let `act` have the config that `args` compose (or each of a sweep); what was typed wrong is one sentence."""
    from launch.answers import explain, flags_first, reject_flags, spell_out
    from launch.config import register, reject_hidden_presets

    if _asks_help(args):
        from launch.keys import describe

        print(describe())
        return 0
    try:
        reject_flags(args)
        args = spell_out(flags_first(args))
        reject_hidden_presets(_user_folders(args))
        register()
        return _run_hydra(args, act)
    except ValueError as error:
        return _complain(str(error))
    except Exception as error:
        sentence = explain(error, args)
        if sentence is None:
            raise
        return _complain(sentence)


def _run_hydra(args: list[str], act: "Act") -> int:
    import hydra

    from launch.answers import reject_additions
    from launch.config import to_config

    codes: list[int] = []
    errors: list[Exception] = []

    def task(composed: "DictConfig") -> None:
        try:
            reject_additions(composed)
            codes.append(act(to_config(composed), args))
        except Exception as error:  # Hydra would print a line of its own about it
            errors.append(error)
            sys.exit(WRONG)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises to us instead of printing and leaving with its own code
    sys.argv = ["atoll", *args]
    try:
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")(task)()
    except SystemExit:
        if not errors:
            raise
        raise errors[0] from None
    return max(codes, default=0)


def _plan(config: "Config", args: list[str]) -> int:
    from launch.plan import named_machine, show
    from launch.plan import plan as make

    if config.engine != "native":
        raise ValueError(f"atoll plan knows what engine=native does, not engine={config.engine}; leave it out")
    planned = make(config, named_machine(config))
    rows = planned.activations.rows(planned.machine.tier) if planned.activations else []
    print(show(planned), "", *rows, sep="\n")
    return 0


def _run(config: "Config", args: list[str]) -> int:
    from launch.driver import run

    report = run(_name_in_sweep(config), overrides=[arg for arg in args if not arg.startswith("-")])
    if report.exit_code == EXIT_RESUMABLE:  # the same SIGTERM, which may come twice, must not end what is left of us
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if report.status in ("stopped", "killed"):
        sys.exit(report.exit_code)  # a sweep ends here too
    return report.exit_code


def _name_in_sweep(config: "Config") -> "Config":
    """In a sweep each job needs a run folder of its own: without ``run.name`` its overrides name it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN or config.run.name:
        return config
    overrides = re.sub(r"[^\w.=,+-]", "_", hydra_config.job.override_dirname)[:200]
    return replace(config, run=replace(config.run, name=f"{config.run_name}-{overrides}"))


def export(args: list[str]) -> int:
    """Write a run's checkpoint as safetensors; the exit code."""
    if _asks_help(args):
        print(EXPORT_USAGE)
        return 0
    given = {key.lstrip("-"): value for key, _, value in (arg.partition("=") for arg in args)}
    unknown = given.keys() - {"run", "to", "step", "dtype"}
    if unknown or not given.get("run") or not given.get("to") or not given.get("step", "0").isdigit():
        return _complain(f"received {' '.join(args) or 'nothing'}; write\n{EXPORT_USAGE}")
    from checkpoint import CheckpointError
    from launch.export import export as write

    step = int(given["step"]) if "step" in given else None
    try:
        print(write(given["run"], given["to"], step=step, dtype=given.get("dtype", "fp32")))
    except (ValueError, OSError, CheckpointError) as error:
        return _complain(str(error))
    return 0


def submit(args: list[str]) -> int:
    """Write what a cluster needs to run the job, and hand it over; the exit code."""
    from launch.submit import parse, send

    try:
        target = parse(args)
    except ValueError as error:
        return _complain(str(error))
    return _composed(target.overrides, lambda config, _: send(target, config))


def report(args: list[str]) -> int:
    """Print what became of a run; the exit code."""
    from launch.report import USAGE as usage
    from launch.report import report as make

    return _printed(make, args, usage)


def chaos(args: list[str]) -> int:
    """Break a running job; the exit code."""
    from launch.chaos import USAGE as usage
    from launch.chaos import chaos as act

    return _printed(act, args or ["--help"], usage)


def _printed(act: Callable[[list[str]], str], args: list[str], usage: str) -> int:
    try:
        print(usage if _asks_help(args) else act(args))
    except ValueError as error:
        return _complain(str(error))
    return 0


def _asks_help(args: list[str]) -> bool:
    return "--help" in args or "-h" in args


def _user_folders(args: list[str]) -> list[Path]:
    """The folders of configs that are not ours: ``./conf`` and ``--config-dir``."""
    folders = [Path("conf")]
    for arg, following in pairwise([*args, ""]):
        flag, _, value = arg.partition("=")
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(value or following))
    return folders


def _complain(sentence: str) -> int:
    print(f"atoll: {sentence}", file=sys.stderr)
    return WRONG
