"""Several GPUs of one host: is every placement right over NCCL, how fast is it beside FSDP2 and DeepSpeed, how long a
sequence trains, and how soon is a killed worker back?

    python benchmarks/multi_gpu.py [--sections check time long kill] [--budget-s 470] [--device cuda]

check   20 steps of a small Llama under every placement and quantization, fp32 and bf16, beside one rank alone
time    3b and 8b at 4096 tokens: ours, FSDP2 and DeepSpeed; 3b on one GPU for the scaling efficiency
long    7b with states and activations in host memory and a sequence over all GPUs, doubled until time or memory ends
kill    SIGKILL for one worker of `atoll train`, with a snapshot after every step, once a spare is ready; losses beside
        an undisturbed run's

Runs on 1, 2, 4 or 8 GPUs and, for `check` and `kill`, on CPUs (``--device cpu --ranks 4``). Prints a table, writes
benchmarks/results/multi_gpu.json after every row, last a JSON object. What does not fit into the budget is said.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

Row = dict[str, Any]
QUIET_NVLS = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast stays off, whatever the caller's environment says."""
PLACEMENTS = ("ddp", "zero1", "zero2", "zero3", "hsdp", "hfsdp", "topo")
LIMITS = {
    ("fp32", "none"): {"loss": 1e-5, "norm": 1e-4, "weights": 1e-4},
    ("bf16", "none"): {"loss": 5e-3, "norm": 1e-2, "weights": 2e-2},
    ("fp32", "quantized"): {"loss": 1e-1, "norm": 1.0, "weights": 1e-1},
    ("bf16", "quantized"): {"loss": 1e-1, "norm": 1.0, "weights": 1e-1},
}
"""Largest relative differences to one rank alone after 20 steps; AdamW makes much of a small gradient's last bits, and
nothing of a factor on all gradients: that shows in their norm alone."""
AFTER_STEPS = 10
"""Steps that a job makes after its recovery."""
RESUMABLE = 75
CASE_S = {"check": 60.0, "time": 110.0}
"""The longest a case may take; what hangs is ended and the next ones go on without it."""
TOO_LONG = "took too long"


def meshes(ranks: int) -> list[dict[str, int]]:
    """Levels that one host can be cut into; two of one member where nothing else is there to cut."""
    if ranks >= 8:
        return [{"node": 2, "gpu": ranks // 4, "die": 2}]
    if ranks >= 4:
        return [{"node": 2, "gpu": ranks // 2}]
    return [{"node": ranks, "gpu": 1}, {"node": 1, "gpu": ranks}]


def check_cases(ranks: int, device: str) -> list[dict[str, Any]]:
    cases = []
    for dtype in ("fp32", "bf16") if device == "cuda" else ("fp32",):
        for levels in meshes(ranks):
            for placement in PLACEMENTS:
                for quantize in ("none", "outer", "all"):
                    kind = "none" if quantize == "none" else "quantized"
                    parallel = {"placement": placement, "levels": levels, "quantize": quantize}
                    cases.append(
                        {"section": "check", "dtype": dtype, "parallel": parallel, "limits": LIMITS[dtype, kind]}
                    )
    return cases


def time_cases(ranks: int, repeats: int) -> list[dict[str, Any]]:
    """The pairs that are compared, the others that are asked for, the pairs again, and what else tells something."""
    two, one = meshes(ranks)[0], {"gpu": ranks}

    def case(name: str, model: str, batch: int, *, engine: str = "native", ranks: int = ranks, **more: Any) -> Row:
        recompute = more.pop("recompute", False)
        zero = more.pop("zero", {})
        return {
            "section": "time", "name": name, "model": model, "seq": 4096, "batch": batch, "engine": engine,
            "ranks": ranks, "recompute": recompute, "zero": zero, "parallel": more, "machine": "dgx-h100", "steps": 9,
            "warm_up": 4,
        }  # fmt: skip

    pair = [
        case("zero3", "3b", 2, placement="zero3", levels=one),
        case("FSDP2 zero3", "3b", 2, engine="fsdp2", placement="zero3", levels=one),
    ]
    alone = [case("alone", "3b", 2, ranks=1, placement="zero3", levels={"gpu": 1})]
    large = [
        case("zero3", "8b", 1, placement="zero3", levels=one, recompute=True),
        case("FSDP2 zero3", "8b", 1, engine="fsdp2", placement="zero3", levels=one, recompute=True),
    ]
    hsdp = [
        case("hsdp", "3b", 2, placement="hsdp", levels=two),
        case("hsdp", "8b", 1, placement="hsdp", levels=two, recompute=True),
    ]
    plus = {"zero_quantized_weights": True, "zero_quantized_gradients": True, "zero_hpz_partition_size": ranks}
    asked = [
        case("auto", "3b", 2, placement="auto", levels=one),
        case("auto", "8b", 1, placement="auto", levels=one, recompute=True),
        case("topo", "3b", 2, placement="topo", levels=two),
        case("topo", "8b", 1, placement="topo", levels=two, recompute=True),
        *(hsdp if ranks > 2 else []),
        case("DeepSpeed ZeRO-3", "3b", 2, engine="deepspeed", placement="zero3"),
        case("DeepSpeed ZeRO-3", "8b", 1, engine="deepspeed", placement="zero3", recompute=True),
        case("DeepSpeed ZeRO++", "3b", 2, engine="deepspeed", placement="zero3", zero=plus),
        case("DeepSpeed ZeRO++", "8b", 1, engine="deepspeed", placement="zero3", zero=plus, recompute=True),
    ]
    more = [
        case("zero2", "3b", 2, placement="zero2", levels=one),
        case("FSDP2 zero2", "3b", 2, engine="fsdp2", placement="zero2", levels=one),
        case("topo quantized", "3b", 2, placement="topo", levels=two, quantize="outer"),
        case("zero3 quantized", "3b", 2, placement="zero3", levels=one, quantize="all"),
    ]  # fmt: skip
    rest = [*pair] * (repeats - 1) if ranks > 1 else []
    if ranks == 1:
        return [*pair, *asked[:1]]
    return [*pair, *alone, *large, *asked, *rest, *alone * (repeats - 1), *large * (repeats > 1), *more]


# ------------------------------------------------------------------------------------------ cases in ranks' processes


def play(cases: list[Row], ranks: int, device: str, deadline: float) -> Iterator[tuple[Row, Row]]:
    """Every case and its row, in order; ranks that fail or hang are replaced for the cases that follow."""
    left = list(cases)
    while left:
        if time.monotonic() > deadline - 15:
            yield from ((case, {"left_out": "no time left"}) for case in left)
            return
        together = _same_processes(left)
        num = 0
        for num, row in enumerate(_launch(together, together[0].get("ranks", ranks), device, deadline), start=1):
            yield left[num - 1], row
            if "failed" in row:
                break
        left = left[max(num, 1) :]


def _same_processes(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first cases that share processes: what is timed is alone in its own, so that its memory is its own."""
    return cases if cases[0]["section"] == "check" else cases[:1]


def _launch(cases: list[dict[str, Any]], ranks: int, device: str, deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of cases in one set of processes; the last is of a failure where there is one."""
    told = json.dumps([case | {"device": device} for case in cases])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    process = subprocess.Popen(
        [*command, str(HERE / "multi_gpu_ranks.py"), told],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | QUIET_NVLS,
    )  # fmt: skip
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    said: list[str] = []
    try:
        for case in cases:
            limit = min(deadline, time.monotonic() + CASE_S[case["section"]])
            row = _next_row(lines, said, limit)
            yield {"left_out": "no time left"} if row.get("failed") == TOO_LONG and limit == deadline else row
            if "failed" in row:
                return
    finally:
        if process.poll() is None:
            try:
                process.wait(10 if process.returncode is None and not said else 2)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _next_row(lines: "queue.SimpleQueue[str | None]", said: list[str], limit: float) -> dict[str, Any]:
    while True:
        try:
            line = lines.get(timeout=max(0.1, limit - time.monotonic()))
        except queue.Empty:
            return {"failed": TOO_LONG, "said": said[-5:]}
        if line is None:
            print("".join(said[-40:]), flush=True)
            return {"failed": "its processes ended", "said": said[-5:]}
        if line.startswith("ROW "):
            return {key: value for key, value in json.loads(line[4:]).items() if key != "case"}
        if line.startswith("FAILED "):
            print("".join(said[-40:]), flush=True)
            return {"failed": json.loads(line[7:])["error"]}
        said.append(line)


# ----------------------------------------------------------------------------------------------------- whole jobs


class Run:
    """`atoll train` in a process of its own, in a folder of its own."""

    def __init__(self, name: str, root: Path, overrides: list[str]) -> None:
        self.path = root / name
        self.log = root / f"{name}.log"
        root.mkdir(parents=True, exist_ok=True)
        self._command = [
            sys.executable,
            "-m",
            "launch",
            "train",
            f"run.name={name}",
            f"run.root={root}",
            *overrides,
        ]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        env = os.environ | QUIET_NVLS | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        with self.log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True, env=env)

    def steps(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait_for(self, step: int, deadline: float) -> float:
        """The moment at which `step` is in the metrics. TimeoutError where it never is."""
        while not any(line["step"] >= step for line in self.steps()):
            if time.monotonic() > deadline or (self.process.poll() is not None and self.process.returncode):
                raise TimeoutError(f"step {step} did not come: {self.tail()}")
            time.sleep(0.05)
        return time.monotonic()

    def wait_for_spares(self, deadline: float) -> float:
        """The moment at which a process stands ready that is no rank."""
        ranks = {rank["pid"] for rank in json.loads((self.path / "team.json").read_text())["ranks"]}
        while True:
            family = psutil.Process(self.process.pid).children(recursive=True)
            workers = [each for each in family if each.name().startswith("ray::Bootstrap") and each.pid not in ranks]
            if workers and all(map(_has_loaded, workers)):
                return time.monotonic()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no spare was ready: {self.tail()}")
            time.sleep(0.1)

    def stop(self, deadline: float) -> None:
        """End it after a step, with a checkpoint."""
        self.process.terminate()
        if (code := self.process.wait(max(1.0, deadline - time.monotonic()))) != RESUMABLE:
            raise TimeoutError(f"it ended with {code} at a SIGTERM: {self.tail()}")

    def finish(self, deadline: float) -> int:
        """The exit code, started again while it is not 0, as a requeue rule would. Ends what outlasts the deadline."""
        while True:
            try:
                code = self.process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise TimeoutError(f"{self.path.name} did not end: {self.tail()}") from None
            if code == 0 or time.monotonic() > deadline:
                return code
            self.process = self._start()

    def tail(self) -> str:
        return self.log.read_text()[-1500:] if self.log.exists() else ""


def _has_loaded(worker: psutil.Process) -> bool:
    """Whether it has torch, and is done with importing: Ray's title names the call that a worker is in."""
    has_torch = any("libtorch" in each.path for each in worker.memory_maps())
    return has_torch and "".join(worker.cmdline()).strip() == "ray::Bootstrap"


def kill(ranks: int, device: str, root: Path, deadline: float) -> dict[str, Any]:
    """One worker of a job that has been running killed: seconds until the next step, steps lost, and whether the losses
    are those of a job of as many steps that is left alone."""
    overrides = [
        f"launch.workers={ranks}", f"launch.device={device}", "train.eval_every_steps=0", "train.sample_tokens=0",
        f"train.global_batch_size={8 * ranks}", "optimizer.schedule=constant", "checkpoint.snapshot_every_steps=1",
        "logger.tensorboard=false", "logger.plot=false",
    ]  # fmt: skip
    if device == "cuda":
        overrides += ["model.dim=1024", "model.ffn_dim=2816", "model.num_layers=12", "model.num_heads=16"]
        overrides += ["model.num_kv_heads=8", "model.head_dim=64", "train.seq_len=1024", "train.deterministic=true"]
    broken, undisturbed = Run("broken", root, [*overrides, "train.steps=1000000"]), None
    try:
        row = _killed(broken, deadline)
        undisturbed = Run("undisturbed", root, [*overrides, f"train.steps={len(broken.steps())}"])
        undisturbed.finish(deadline)
        losses = [[line["loss"] for line in run.steps()] for run in (undisturbed, broken)]
        same = losses[0] == losses[1]
        return row | {"bitwise": same, "steps": len(losses[1]), "ok": same and len(losses[0]) > AFTER_STEPS}
    except (TimeoutError, OSError) as error:
        return {"name": "a worker killed", "failed": str(error)}
    finally:
        for run in (broken, undisturbed):
            if run and run.process.poll() is None:
                os.killpg(run.process.pid, signal.SIGKILL)


def _killed(run: Run, deadline: float) -> dict[str, Any]:
    """Kill a worker once a spare is ready, and stop the run when it has made some steps more."""
    trains = run.wait_for(0, deadline)
    team = json.loads((run.path / "team.json").read_text())
    ready = run.wait_for_spares(deadline)
    victim = team["ranks"][-1]
    before = run.steps()[-1]["step"]
    os.kill(victim["pid"], signal.SIGKILL)
    killed = time.monotonic()
    time.sleep(0.3)
    reached = max(before, run.steps()[-1]["step"])
    back_s = run.wait_for(reached + 1, deadline) - killed
    run.wait_for(reached + AFTER_STEPS, deadline)
    run.stop(deadline)
    records = (run.path / "failures.jsonl").read_text().splitlines()
    return {
        "name": f"rank {victim['rank']} killed after step {before}",
        "next_step_after_s": back_s,
        "spare_ready_after_s": ready - trains,
        "killed_after_s": killed - trains,
        "failures": [json.loads(record) for record in records],
        "took": next((line for line in run.log.read_text().splitlines() if line.startswith("recovered in")), None),
    }


def long(
    ranks: int, root: Path, deadline: float, model: str, first: int, activations: list[str], steps: int
) -> Iterator[dict[str, Any]]:
    """Sequences over all GPUs, twice as long each time, until one does not fit or there is no time for the next. The
    last of `steps` is timed: the first compiles, and makes host memory for what blocks swap."""
    seq_len, last_s = first, 0.0
    while time.monotonic() + 3.5 * last_s + 60 < deadline:
        start = time.monotonic()
        run = Run(
            f"{model}-{seq_len}", root,
            [
                f"model={model}", f"launch.workers={ranks}", "launch.device=cuda", "parallel=zero3", "offload=host",
                f"parallel.levels={{gpu: {ranks}}}", "parallel.sequence=gpu", "offload.predict=false",
                *(f"offload.activations{each}" for each in activations), f"train.seq_len={seq_len}",
                f"train.steps={steps}", "train.global_batch_size=1", "train.eval_every_steps=0",
                "train.sample_tokens=0", "train.eval_sequences=0", "train.dtype=bf16", "data.valid_fraction=0",
                "logger.tensorboard=false", "logger.plot=false",
            ],
        )  # fmt: skip
        try:
            run.wait_for(steps - 1, deadline)
        except TimeoutError as error:
            done = [{key: line[key] for key in ("step", "step_s", "loss")} for line in run.steps()]
            yield {"name": f"{model} {seq_len} tokens", "failed": str(error)[-700:], "steps": done}
            return
        finally:
            if run.process.poll() is None:
                os.killpg(run.process.pid, signal.SIGKILL)
        last = run.steps()[-1]
        gpu = {key: value for key, value in last.items() if "gpu" in key or "memory" in key}
        yield {
            "name": f"{model} {seq_len} tokens", "seq": seq_len, "step": last["step"], "step_s": last["step_s"],
            "loss": last["loss"], "tokens_per_s_a_gpu": last["tokens_per_s"] / ranks, "mfu": last["mfu"], **gpu,
        }  # fmt: skip
        last_s, seq_len = time.monotonic() - start, 2 * seq_len


# --------------------------------------------------------------------------------------------------------- the report


class Report:
    """The rows so far, printed and written as they come."""

    def __init__(self, path: str, hardware: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path, self._hardware = path, hardware

    def add(self, section: str, case: dict[str, Any], row: dict[str, Any]) -> None:
        from benchmarks.report import write_report

        names = ["name", "model", "batch", "ranks", "engine", "dtype", "parallel"]
        known = {key: case[key] for key in names if key in case}
        self.rows.append({"section": section, **known, **row})
        write_report(self._path, self._hardware, self.rows)
        print(show(self.rows[-1]), flush=True)


def show(row: dict[str, Any]) -> str:
    parallel = row.get("parallel", {})
    placed = " x ".join(f"{name} {size}" for name, size in parallel.get("levels", {}).items())
    what = row.get("name") or f"{parallel.get('placement')} {parallel.get('quantize')} {row.get('dtype')} on {placed}"
    head = f"{row['section']:6} {row.get('model', ''):3} {what:34}"
    for problem in ("failed", "left_out"):
        if problem in row:
            return f"{head} {problem}: {str(row[problem])[:160]}"
    if row["section"] == "check":
        verdict = "ok" if row["ok"] else "WRONG"
        return f"{head} {verdict:6} loss {row['loss_error']:.1e} weights {row['weights_error']:.1e}"
    if row["section"] == "kill":
        return f"{head} next step after {row['next_step_after_s']:.2f} s, bitwise {row['bitwise']}; {row['took']}"
    figures = f"{row['step_s']:8.3f} s {row['tokens_per_s_a_gpu']:8.0f} tokens/s a GPU"
    figures += f"  MFU {100 * row['mfu']:.1f}%" if row.get("mfu") else ""
    if "exposed_s" in row:
        figures += f"  {row['reserved_GiB']:5.1f} GiB  NCCL {1e3 * row['communication_s']:.0f} ms, exposed "
        figures += f"{1e3 * row['exposed_s']:.0f} ms"
    return f"{head} {figures}"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The ratios that are asked for: medians over the repeats of each side."""
    import statistics

    def speed(name: str, model: str) -> float | None:
        found = [
            row["tokens_per_s_a_gpu"] for row in rows
            if row["section"] == "time" and row["name"] == name and row["model"] == model and "step_s" in row
        ]  # fmt: skip
        return statistics.median(found) if found else None

    def ratio(a: float | None, b: float | None) -> float | None:
        return round(a / b, 4) if a and b else None

    checks = [row for row in rows if row["section"] == "check"]
    return {
        "checks": len(checks),
        "checks_ok": sum(bool(row.get("ok")) for row in checks),
        "zero3_over_fsdp2": {m: ratio(speed("zero3", m), speed("FSDP2 zero3", m)) for m in ("3b", "8b")},
        "zero2_over_fsdp2": ratio(speed("zero2", "3b"), speed("FSDP2 zero2", "3b")),
        "zero3_over_deepspeed": {m: ratio(speed("zero3", m), speed("DeepSpeed ZeRO-3", m)) for m in ("3b", "8b")},
        "scaling_efficiency": ratio(speed("zero3", "3b"), speed("alone", "3b")),
        "recovery": [row.get("next_step_after_s") for row in rows if row["section"] == "kill"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ["check", "time", "kill", "long"]
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    parser.add_argument("--budget-s", type=float, default=470, help="for all sections together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=None)
    parser.add_argument("--ranks", type=int, default=None, help="default: every GPU, or 2 on CPU")
    parser.add_argument("--repeats", type=int, default=2, help="of the pairs that are compared")
    parser.add_argument("--cases", nargs="+", default=None, help="of the timed ones, as '3b zero3'; default: all")
    parser.add_argument("--long", nargs=2, default=["7b", "65536"], metavar=("MODEL", "TOKENS"), help="where to begin")
    parser.add_argument(
        "--long-activations", nargs="+", default=["=swap", ".alpha=0", ".keep_last=0"], metavar="OVERRIDE",
        help="of offload.activations",
    )  # fmt: skip
    parser.add_argument("--long-steps", type=int, default=2, help="of a run; with 1 its time has the compilation in it")
    parser.add_argument("--root", type=Path, default=None, help="folder for the jobs' runs")
    parser.add_argument("--out", default=str(HERE / "results" / "multi_gpu.json"))
    args = parser.parse_args()
    import tempfile

    import torch

    gpus = torch.cuda.device_count()
    device = args.device or ("cuda" if gpus else "cpu")
    ranks = args.ranks or (gpus if device == "cuda" else 2)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    if ranks not in (1, 2, 4, 8):
        parser.error(f"there are meshes for 1, 2, 4 and 8 ranks, not for {ranks}: set --ranks or CUDA_VISIBLE_DEVICES")
    timed = list(dict.fromkeys(f"{case['model']} {case['name']}" for case in time_cases(ranks, args.repeats)))
    if unknown := sorted(set(args.cases or ()) - set(timed)):
        parser.error(f"--cases has {unknown}: choose from {timed}, each in quotes")
    report = Report(args.out, f"{ranks} x {name}, {os.cpu_count()} cores")
    deadline = time.monotonic() + args.budget_s
    root = args.root or Path(tempfile.mkdtemp(prefix="multi_gpu_"))
    for section in args.sections:
        if section == "check":
            for case, row in play(check_cases(ranks, device), ranks, device, deadline):
                report.add(section, case, row)
        elif section == "time" and device == "cuda":
            cases = time_cases(ranks, args.repeats)
            wanted = [case for case in cases if not args.cases or f"{case['model']} {case['name']}" in args.cases]
            for case, row in play(wanted, ranks, device, deadline):
                report.add(section, case, row)
        elif section == "kill" and ranks > 1:
            report.add(section, {}, kill(ranks, device, root, deadline))
        elif section == "long" and device == "cuda":
            model, first = args.long[0], int(args.long[1])
            for row in long(ranks, root, deadline, model, first, args.long_activations, args.long_steps):
                report.add(section, {}, row)
        else:
            print(f"{section}: not on {ranks} x {device}")
    print(json.dumps(summary(report.rows)))


if __name__ == "__main__":
    main()
