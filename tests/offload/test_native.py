import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from offload.adamw import sum_of_squares
from offload.hostpool import HostPool
from offload.native import NativeError, load_native

ROOT = Path(__file__).parents[2]
SOURCE = "int atoll_answer(void) { return %d; }\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "atoll"


def source(folder: Path, answer: int) -> list[Path]:
    (folder / "a.c").write_text(SOURCE % answer)
    return [folder / "a.c"]


def test_a_library_is_built_once_and_again_when_its_source_changes(cache: Path, tmp_path: Path) -> None:
    assert load_native("a", source(tmp_path, 1)).atoll_answer() == 1
    built = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert load_native("a", source(tmp_path, 1)).atoll_answer() == 1
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == built and len(built) == 1
    assert load_native("a", source(tmp_path, 2)).atoll_answer() == 2
    assert len(list(cache.iterdir())) == 2


def test_another_header_is_another_library(cache: Path, tmp_path: Path) -> None:
    header = tmp_path / "b.h"
    (tmp_path / "b.c").write_text('#include "b.h"\nint atoll_answer(void) { return ANSWER; }\n')
    for answer in (3, 4):
        header.write_text(f"#define ANSWER {answer}\n")
        assert load_native("b", [tmp_path / "b.c", header]).atoll_answer() == answer


def test_a_library_cut_short_by_a_crash_is_built_again(cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from offload.native import load_native;"
        "print(load_native('a', [Path(sys.argv[1])]).atoll_answer())"
    )
    command = [sys.executable, "-c", code, str(source(tmp_path, 5)[0])]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout == "5\n"
        (file,) = cache.iterdir()
        os.truncate(file, 100)


def test_many_ranks_build_at_once(cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from offload.native import load_native;"
        "assert load_native('a', [Path(sys.argv[1])]).atoll_answer() == 6"
    )
    command = [sys.executable, "-c", code, str(source(tmp_path, 6)[0])]
    ranks = [subprocess.Popen(command, cwd=ROOT) for _ in range(6)]
    assert [rank.wait(60) for rank in ranks] == [0] * 6
    assert len(list(cache.iterdir())) == 1, "drafts are left behind"


def test_a_compiler_that_fails_is_an_error_with_its_first_complaint(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "c.c").write_text("int broken( {\n")
    with pytest.raises(NativeError, match=r"compiler failed.*c\.c:1.*error"):
        load_native("c", [tmp_path / "c.c"])
    assert list(cache.iterdir()) == []


def test_a_folder_that_others_may_write_is_refused(cache: Path, tmp_path: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(NativeError, match="not this user's alone.*XDG_CACHE_HOME"):
        load_native("a", source(tmp_path, 1))


def test_without_a_compiler_torch_does_the_work_and_that_is_said_once(
    torch_pool: HostPool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), HostPool(1) as again:
        assert not again.native
    # the fixture's own pool said it before the log was watched
    said = [r.message for r in [*caplog.get_records("setup"), *caplog.records] if "times slower" in r.message]
    assert len(said) == 1 and "'no-such-compiler' is not there; install gcc or clang" in said[0]
    assert sum_of_squares(torch.full((10,), 2.0), pool=torch_pool) == 40


def test_the_threads_are_as_many_as_said_whatever_omp_says() -> None:
    code = (
        "import os; from offload.hostpool import HostPool\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count(); pool = HostPool(5); print(count() - before); pool.close(); print(count() - before)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["5", "0"]


def test_a_pinned_thread_runs_on_its_core() -> None:
    core = max(os.sched_getaffinity(0))
    before = set(os.listdir("/proc/self/task"))
    with HostPool(2, cpus=[core, core]):
        started = set(os.listdir("/proc/self/task")) - before
        assert [os.sched_getaffinity(int(thread)) for thread in started] == [{core}] * 2


def test_bad_threads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"offload\.threads=0: at least 1"):
        HostPool(0)
    with pytest.raises(ValueError, match=r"offload\.cpus=\[99999\].*may use"):
        HostPool(cpus=[99999])


def test_calls_from_many_threads_are_all_answered(pool: HostPool) -> None:
    values = [torch.full((100_000 + 17 * i,), float(i)) for i in range(8)]
    found: dict[int, list[float]] = {i: [] for i in range(8)}

    def work(i: int) -> None:
        found[i] = [sum_of_squares(values[i], pool=pool) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [float(i * i * (100_000 + 17 * i))] * 50 for i in range(8)}


def test_a_call_lets_other_python_threads_run(pool: HostPool) -> None:
    values = torch.ones(30_000_000)
    done = threading.Event()

    def work() -> None:
        for _ in range(5):
            sum_of_squares(values, pool=pool)
        done.set()

    turns = 0
    threading.Thread(target=work).start()
    while not done.is_set():
        turns += 1
        time.sleep(0.001)
    assert turns > 5


def test_a_closed_pool_refuses(pool: HostPool) -> None:
    mine = HostPool(1)
    mine.close()
    mine.close()
    with pytest.raises(RuntimeError, match="closed"):
        sum_of_squares(torch.ones(3), pool=mine)


def test_a_pool_does_not_survive_a_fork(pool: HostPool) -> None:
    child = os.fork()
    if child == 0:
        try:
            sum_of_squares(torch.ones(3), pool=pool)
        except RuntimeError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_pool_that_a_fork_lets_go_of_or_closes_is_not_waited_for() -> None:
    """Its threads, and whoever called it then, are in the parent alone."""
    mine, lost = HostPool(2), [HostPool(2)]
    mine._running = 1  # as while another thread of the parent is in a call
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # one that waits for threads that are not there waits for good
        lost.clear()
        mine.close()
        os._exit(7)
    mine._running = 0
    mine.close()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_library_says_how_wide_its_vectors_are(pool: HostPool) -> None:
    assert isinstance(pool._library, ctypes.CDLL)
    assert pool._library.atoll_lanes() in (1, 8, 16)
