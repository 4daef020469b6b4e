"""One worker trains in the driver's own process: ends, exit codes, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from launch.failures import FILE, FailureRecord
from launch.options import LaunchOptions
from launch.worker import describe
from offload.arena import Arena
from offload.nvme import NvmeTier
from tests.launch.conftest import COMMAND

SMALL = (
    "launch.workers=1 launch.device=cpu model.dim=32 model.num_heads=2 model.ffn_dim=64 model.num_layers=1 "
    "train.seq_len=64 train.eval_sequences=8 train.sample_tokens=0 logger=none"
).split()
ENDLESS = [*SMALL, "train.steps=1000000"]


def test_trains_without_ray(tmp_path: Path) -> None:
    script = (
        "import sys; from launch.cli import main\n"
        f"try: main({['train', *SMALL, 'train.steps=3']})\n"
        "except SystemExit as end: assert end.code == 0, end\n"
        "assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs" / "tiny-stdlib" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 0), (signal.SIGTERM, 75)])
def test_a_signal_ends_after_the_step(atoll_started, number: signal.Signals, exit_code: int) -> None:
    run = atoll_started("train", *ENDLESS)
    seen = [next(line for line in run.stdout if line.startswith("step 1/"))]
    run.send_signal(number)
    seen += run.stdout.readlines()
    assert run.wait(30) == exit_code, seen
    assert f"{number.name}: stopping after this step" in "".join(seen)
    assert "the same command resumes" in seen[-1]


def test_a_second_signal_ends_at_once(atoll_started) -> None:
    run = atoll_started(
        "train", *ENDLESS, "train.global_batch_size=65536", "train.micro_batch_size=16"
    )  # a step of minutes
    assert any(line.startswith("step 0/") for line in run.stdout)
    run.send_signal(signal.SIGINT)
    assert any("once more ends it at once" in line for line in run.stdout)
    run.send_signal(signal.SIGINT)
    assert "ended at once" in "".join(run.stdout)
    assert run.wait(30) == 130


def test_what_only_the_start_finds_wrong_is_one_line(atoll) -> None:
    done = atoll("train", *SMALL, "model.vocab_size=10")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("atoll: model.vocab_size=10")


@pytest.mark.slow
def test_a_step_to_resume_from_that_is_not_there_is_one_line(atoll) -> None:
    done = atoll("train", *SMALL, "run.resume=7")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("atoll: run.resume=7")


def test_a_value_error_is_the_users_where_our_own_code_has_raised_it() -> None:
    told = {}
    for name, act in {"ours": lambda: LaunchOptions(workers=0), "a library's": lambda: json.loads("{")}.items():
        with pytest.raises(ValueError) as found:
            act()
        told[name] = describe(found.value)
    assert told["ours"].user and told["ours"].cause.startswith("launch.workers=0: ")
    assert not told["a library's"].user and told["a library's"].cause.startswith("JSONDecodeError: ")


def test_memory_and_drives_that_are_not_to_be_had_are_told_by_one_sentence(disk_folder: Path) -> None:
    for act, words in (
        (lambda: NvmeTier([disk_folder], 1 << 50), "free some space there, lower offload.nvme_bytes"),
        (lambda: Arena(1 << 50), "lower offload.host_bytes"),
    ):
        with pytest.raises(OSError) as found:
            act()
        told = describe(found.value)
        assert told.user and words in told.cause and "Errno" not in told.cause and "\n" not in told.cause


def test_a_drive_that_is_full_ends_the_start_with_one_line(atoll, small_tmpfs: Path) -> None:
    drive = [f"offload.nvme_path=[{small_tmpfs}]", "offload.nvme_direct=false", "offload.predict=false"]
    done = atoll("train", *SMALL, "offload=nvme", *drive, "model.dim=512", cwd=small_tmpfs.parent)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"atoll: {small_tmpfs}") and "offload.nvme_path" in done.stderr


def test_a_last_checkpoint_that_is_lost_is_a_failure(atoll_started, tmp_path: Path) -> None:
    run = atoll_started("train", *ENDLESS, "checkpoint.url=there")
    assert any(line.startswith("step 1/") for line in run.stdout)
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    (tmp_path / "there").write_text("a file")
    run.send_signal(signal.SIGINT)
    assert any(line.startswith("its last steps are lost") for line in run.stdout)
    assert run.wait(30) == 1


@pytest.mark.slow
def test_a_hang_ends_it_with_its_stack_and_a_stop_by_the_shell_does_not(tmp_path: Path) -> None:
    """Who reads what it prints stops reading, and the pipe is full."""
    reading, writing = os.pipe()
    hang_s, errors = 3, tmp_path / "errors.txt"
    command = [COMMAND, "train", *ENDLESS, f"launch.hang_timeout_s={hang_s}", "launch.collective_timeout_s=20"]
    with errors.open("wb") as stderr:
        run = subprocess.Popen(command, cwd=tmp_path, stdout=writing, stderr=stderr)
    try:
        read_until_a_step(reading)
        run.send_signal(signal.SIGSTOP)
        time.sleep(2 * hang_s)
        run.send_signal(signal.SIGCONT)
        read_until_a_step(reading)
        fill(writing)
        began = time.monotonic()
        assert run.wait(60) == 1
        assert time.monotonic() - began > hang_s
    finally:
        run.kill()
        run.wait(20)
        os.close(reading)
        os.close(writing)
    said = errors.read_text()
    assert said.startswith("atoll: rank 0 on this machine: a hang: it stands still in "), said
    assert f"launch.hang_timeout_s={hang_s}" in said and "progress.py" in said, said
    [failure] = FailureRecord.read(tmp_path / "runs" / "tiny-stdlib" / FILE)
    assert (failure.cause, failure.restored_from) == ("hang", None)


@pytest.mark.slow
def test_a_sigterm_in_a_hang_ends_it_soon_and_resumable(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    run = subprocess.Popen([COMMAND, "train", *ENDLESS], cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE)
    try:
        for _ in range(2):
            read_until_a_step(reading)
        fill(writing)
        wait_until_still(tmp_path / "runs" / "tiny-stdlib" / "metrics.jsonl")
        run.terminate()
        assert run.wait(60) == 75
        with run.stderr as errors:
            said = errors.read().decode()
        assert "a hang: it stands still in " in said and "s, as a stop was asked for)" in said
    finally:
        run.kill()
        run.wait(20)
        os.close(reading)
        os.close(writing)


def read_until_a_step(pipe: int) -> None:
    read = b""
    while not read.rpartition(b"step ")[2].partition(b"/1000000  loss ")[2]:
        more = os.read(pipe, 1 << 16)
        assert more, read
        read += more


def wait_until_still(file: Path, still_s: float = 3) -> None:
    while time.time() - file.stat().st_mtime < still_s:
        time.sleep(0.1)


def fill(pipe: int) -> None:
    """Until nobody can write into it without waiting."""
    own = os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(own, b" ")
    os.close(own)


@pytest.mark.slow
def test_a_sweep_gives_each_job_a_run(atoll, tmp_path: Path) -> None:
    done = atoll("train", "--multirun", *SMALL, "train.steps=1,2")
    assert done.returncode == 0, done.stderr
    runs = [file.parent.name for file in (tmp_path / "runs").glob("*/metrics.jsonl")]
    assert len(runs) == 2 and sum("train.steps=2" in name for name in runs) == 1


def test_export(atoll, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert atoll("train", *SMALL, "train.steps=1", "run.name=a").returncode == 0
    done = atoll("export", "run=a", "to=out")
    assert done.returncode == 0, done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.hidden_size == 32
    again = atoll("export", "run=b", "to=out")
    assert again.returncode == 2 and "runs/ holds a" in again.stderr
