"""Whatever is wrong with what was typed is one sentence on standard error, exit code 2, before torch is imported."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--steps", "5"], ["--steps", "train.steps=5"]),
        (["--batch-size=8"], ["train.global_batch_size=8"]),
        (["train.step=5"], ["train.step", "train.steps=5"]),
        (["steps=5"], ["train.steps=5"]),
        (["optimizer.learning_rate=1"], ["optimizer.learning_rate", "optimizer.lr=1"]),
        (["+train.foo=1"], ["there is no key train.foo"]),
        (["model=3B"], ["model=3B", "choose one of", "did you mean model=3b"]),
        (["modl=tiny"], ["model=tiny"]),
        (["model.path=x"], ["model.path"]),
        (["trian.steps=5"], ["there is no key trian.steps", "train.steps=5"]),
        (["train.steps="], ["received ''", "int"]),
        (["optimizer.lr=nan"], ["optimizer.lr=nan"]),
        (["run.name=../other"], ["run.name=../other", "run.root="]),
        (["train.steps=many"], ["train.steps", "'many'", "int"]),
        (["data=text", "data.paths=a.txt"], ["data.paths=[a.txt]"]),
        (["train=5"], ["train is a section", "train.steps"]),
        (["train.steps"], ["key=value"]),
        (["train.steps=1,2"], ["--multirun"]),
        (["parallel=zero4"], ["parallel=zero4", "choose one of", "did you mean parallel=zero"]),
        (["engine=jax"], ["engine='jax'", "native"]),
        (["launch.workers=3", "parallel.levels={node:2,gpu:2}"], ["parallel.levels", "4", "launch.workers=3"]),
        (["parallel.levels=[2,2]"], ["parallel.levels=[2,2]", "dict[str, int]", "{name: value}"]),
        (["parallel.levels={node: two}"], ["parallel.levels.node", "'two'", "parallel.levels={name: value}"]),
        (
            ["machine=frontier", "+machine.links.node.size=3"],
            ["+machine.links.node.size=3", "machine is one value (str)"],
        ),
        (["launch.workers=3"], ["train.global_batch_size=16", "launch.workers=3"]),
        (["train.micro_batch_size=5"], ["train.micro_batch_size=5"]),
        (["launch.nodes=2"], ["launch.nodes=2", "launch.address"]),
        (["checkpoint.url=memory://here"], ["checkpoint.url=memory://here", "launch.workers=2"]),
        (["engine=deepspeed", "parallel=topo"], ["parallel.placement=topo", "engine=deepspeed"]),
        (["run.root=/proc/nowhere"], ["run.root=/proc/nowhere"]),
        (["launch.address=127.0.0.1:1"], ["launch.address=127.0.0.1:1", "refused"]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_names_what_was_meant(atoll, args: list[str], words: list[str]) -> None:
    began = time.monotonic()
    done = atoll("train", *args, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.startswith("atoll: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert time.monotonic() - began < 20  # 3 s where nothing else runs


def test_a_gpu_that_is_not_there(atoll) -> None:
    done = atoll("train", "launch.device=cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "launch.device=cuda" in done.stderr and "0 GPUs" in done.stderr


def test_a_plan_is_of_our_engine(atoll) -> None:
    done = atoll("plan", "machine=dgx-h100", "launch.workers=2", "engine=fsdp2")
    assert done.returncode == 2 and "engine=fsdp2" in done.stderr and done.stderr.count("\n") == 1


def test_unknown_command(atoll) -> None:
    done = atoll("trian")
    assert done.returncode == 2 and "'trian'" in done.stderr and "atoll train" in done.stderr


def test_help_lists_presets_and_keys(atoll) -> None:
    done = atoll("train", "--help")
    assert done.returncode == 0
    assert "zero1 zero2 zero3" in done.stdout and "train.micro_batch_size=null" in done.stdout
    assert "Sequences in one forward" in done.stdout


@pytest.mark.parametrize("command", ["plan", "export", "submit", "report", "chaos"])
def test_help_of_a_command(atoll, command: str) -> None:
    done = atoll(command, "--help")
    assert done.returncode == 0 and f"atoll {command}" in done.stdout


def test_version(atoll) -> None:
    assert atoll("--version").stdout.startswith("atoll 0.")


def test_showing_the_config_writes_nothing(atoll, tmp_path: Path) -> None:
    done = atoll("train", "--cfg", "job", "train.steps=7")
    assert done.returncode == 0 and "steps: 7" in done.stdout
    assert not list(tmp_path.iterdir())


def test_name_taken_by_a_file_of_the_user(atoll, tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("")
    done = atoll("train", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "'trainer'" in done.stderr and str(tmp_path / "trainer.py") in done.stderr and done.stderr.count("\n") == 1


def test_the_users_own_presets(atoll, tmp_path: Path) -> None:
    preset = tmp_path / "conf" / "optimizer" / "mine.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("lr: 0.25\n")
    assert "lr: 0.25" in atoll("train", "optimizer=mine", "--cfg", "job").stdout
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shown = atoll("train", f"--config-dir={tmp_path / 'conf'}", "optimizer=mine", "--cfg", "job", cwd=elsewhere)
    assert "lr: 0.25" in shown.stdout


def test_a_preset_that_ours_would_hide(atoll, tmp_path: Path) -> None:
    preset = tmp_path / "conf" / "optimizer" / "adamw.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("lr: 0.25\n")
    done = atoll("train", "--cfg", "job")
    assert done.returncode == 2 and "conf/optimizer/adamw.yaml" in done.stderr and "rename" in done.stderr


def test_flags_may_come_after_overrides(atoll) -> None:
    done = atoll("train", "train.steps=7", "--cfg", "job")
    assert done.returncode == 0 and "steps: 7" in done.stdout


def test_help_into_a_pipe_that_closes(tmp_path: Path) -> None:
    shell = ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m launch train --help | head -1"]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def unread(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python's output goes into a pipe that nobody reads, through its buffer."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    command = (sys.executable, *command)
    done = subprocess.run(command, cwd=folder, env=env, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    return done


@pytest.mark.parametrize("asked", ["--version", "--help", "train --help", "chaos --help"])
def test_into_a_pipe_that_nobody_reads(tmp_path: Path, asked: str) -> None:
    """Also where all of it fits the buffer, which is written last."""
    done = unread(tmp_path, "-m", "launch", *asked.split())
    assert (done.returncode, done.stderr) == (1, "")


def test_an_error_is_told_also_where_nobody_reads_the_output(tmp_path: Path) -> None:
    script = (
        "from launch import cli\n"
        "def report(args):\n    print('half')\n    raise RuntimeError('fault')\n"
        "cli.report = report\ncli.main(['report'])"
    )
    done = unread(tmp_path, "-c", script)
    assert done.returncode != 0 and "RuntimeError: fault" in done.stderr


def test_ctrl_c_while_the_config_is_composed(tmp_path: Path) -> None:
    script = (
        "import os, signal, threading; from launch.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's job in the background ignores it
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "main(['train', '--cfg', 'job'])"  # Hydra's import alone takes longer
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
