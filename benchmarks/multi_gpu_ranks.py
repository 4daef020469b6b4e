"""One rank of `multi_gpu.py`: runs the cases of its command line one after another; rank 0 prints a row of each.

    torchrun --standalone --nproc-per-node 2 benchmarks/multi_gpu_ranks.py '[{"section": "check", …}, …]'

A case that fails ends all ranks, since the others may wait for it in a collective.
"""

import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.in_memory import preset  # noqa: E402
from launch.config import Config  # noqa: E402
from launch.options import LaunchOptions  # noqa: E402
from launch.plan import settle  # noqa: E402
from offload.options import ActivationOptions, OffloadOptions  # noqa: E402
from offload.state import MASTER  # noqa: E402
from parallel import OptimizerOptions, ParallelOptions  # noqa: E402
from parallel.engine import Engine  # noqa: E402
from trainer.build import Rank, build_engine, choose_dtype  # noqa: E402
from trainer.job import Job  # noqa: E402
from trainer.models import build_model  # noqa: E402
from trainer.models.attention import attention_backends  # noqa: E402
from trainer.options import LlamaOptions, TrainOptions  # noqa: E402

CLIP, LR = 1.0, 1e-3
SMALL = LlamaOptions(dim=256, ffn_dim=704, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, compile=False)
CHECK_STEPS, CHECK_VOCAB, CHECK_SEQ, CHECK_ROWS = 20, 512, 128, 2


# ------------------------------------------------------------------------------------------------------- correctness


def check(case: dict[str, Any], where: Rank, references: dict[str, Any]) -> dict[str, Any]:
    """Twenty steps under a placement beside the same steps of one rank alone: losses, norms, weights.

    The reference runs on every rank, with the other ranks' micro-batches one after another, so that each product has
    the same shape; what is left between the two is the order of sums, and what quantization takes.
    """
    alone = Rank(0, 1, where.device)
    if case["dtype"] not in references:
        references[case["dtype"]] = _train_small(ParallelOptions(), case["dtype"], alone, where.world)
    expected = references[case["dtype"]]
    found = _train_small(ParallelOptions(**case["parallel"]), case["dtype"], where, 1)
    squares = torch.zeros(2, dtype=torch.float64)
    for (name, start), master in found["masters"].items():
        reference = expected["masters"][name, 0][start : start + master.numel()]
        squares += torch.stack(((master - reference).double().square().sum(), reference.double().square().sum()))
    dist.all_reduce(squares)
    evaluated = [torch.zeros_like(found["evaluated"]) for _ in range(where.world)]
    dist.all_gather(evaluated, found["evaluated"])
    loss = ((found["losses"] - expected["losses"]).abs() / expected["losses"]).max().item()
    norm = ((found["norms"] - expected["norms"]).abs() / expected["norms"]).max().item()
    weights = (squares[0] / squares[1]).sqrt().item()
    alike = all(torch.equal(evaluated[0], other) for other in evaluated)
    limits = case["limits"]
    return {
        "loss_error": loss, "norm_error": norm, "weights_error": weights, "ranks_alike": alike,
        "learns": bool(found["losses"][-1] < found["losses"][0]),
        "ok": alike and loss < limits["loss"] and norm < limits["norm"] and weights < limits["weights"],
    }  # fmt: skip


def _train_small(parallel: ParallelOptions, dtype: str, where: Rank, num_shares: int) -> dict[str, Any]:
    """The small job on `where.world` ranks, each with `num_shares` micro-batches; master weights by name and start."""
    torch.manual_seed(0)
    compute, _ = choose_dtype(dtype, where.device)
    job = Job(model=SMALL, train=TrainOptions(dtype=dtype), optimizer=OptimizerOptions(lr=LR), parallel=parallel)
    model = build_model(SMALL, vocab_size=CHECK_VOCAB, seq_len=CHECK_SEQ, dtype=compute, device=where.device)
    engine = build_engine(job, model, where, compute)
    count = where.world * num_shares
    losses, norms = [], []
    for step in range(CHECK_STEPS):
        loss = torch.zeros((), device=where.device)
        for share in range(num_shares):
            rows = _rows(step, where.rank * num_shares + share, where.device)
            first, last = share == 0, share == num_shares - 1
            loss += engine.forward_backward(*rows, scale=1 / count, first=first, last=last) / count
        norms.append(engine.step(LR, CLIP).float().cpu())
        if where.world > 1:
            dist.all_reduce(loss)
        losses.append(loss.cpu())
    found = {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "evaluated": engine.evaluate(*_rows(0, 0, where.device)).cpu(),
        "masters": {(p.name, p.start): p.tensor.clone().cpu() for p in engine.pieces() if p.kind == MASTER},
    }
    engine.close()
    return found


def _rows(step: int, share: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens in which something can be learned: each follows from the one before."""
    generator = torch.Generator().manual_seed(1000 * step + share)
    first = torch.randint(CHECK_VOCAB, (CHECK_ROWS, 1), generator=generator)
    rows = (first + 7 * torch.arange(CHECK_SEQ + 1)) % CHECK_VOCAB
    return rows[:, :-1].to(device), rows[:, 1:].to(device)


# ------------------------------------------------------------------------------------------------------------- speed


def measure(case: dict[str, Any], where: Rank, references: dict[str, Any]) -> dict[str, Any]:
    """Seconds a step, memory, and how much of a step the GPU spends in collectives alone."""
    torch.manual_seed(0)
    model_options, seq_len, batch = preset(case["model"]), case["seq"], case["batch"]
    train = TrainOptions(seq_len=seq_len, global_batch_size=batch * where.world, clip_norm=CLIP)
    mode = "checkpoint" if case["recompute"] else "keep"
    config = Config(
        engine=case["engine"], model=model_options, train=train, optimizer=OptimizerOptions(lr=1e-5),
        parallel=ParallelOptions(**case["parallel"]), launch=LaunchOptions(workers=where.world),
        machine=case["machine"], offload=OffloadOptions(activations=ActivationOptions(mode=mode)),
    )  # fmt: skip
    config, why = settle(config, where.world)
    compute, _ = choose_dtype("auto", where.device)
    if case.get("zero"):
        _also_configure(case["zero"])
    llama = build_model(config.model, vocab_size=32000, seq_len=seq_len, dtype=compute, device=where.device)
    flops = llama.flops_per_token(seq_len) * batch * seq_len
    engine = build_engine(config.job(), llama, where, compute)
    rows = torch.randint(0, 32000, (batch, seq_len + 1), device=where.device)
    rows = rows.roll(where.rank, 0)
    times = []
    with attention_backends(where.device):
        for i in range(case["steps"]):
            _meet(where)
            start = time.perf_counter()
            loss = _step(engine, rows, where)
            _meet(where)
            times.append(time.perf_counter() - start)
            if where.rank == 0:
                print(f"step {i} {times[-1]:.3f} s loss {loss.item():.4f}", flush=True)
        exposed = _exposed_s(engine, rows, where) if where.device.type == "cuda" else {}
    median = statistics.median(times[case["warm_up"] :])
    memory: dict[str, float] = {}
    if where.device.type == "cuda":
        peak = torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], device=where.device)
        if where.world > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        memory = {"allocated_GiB": peak[0].item() / 2**30, "reserved_GiB": peak[1].item() / 2**30}
    engine.close()
    return {
        "step_s": median, "tokens_per_s_a_gpu": batch * seq_len / median, "TFLOPs_a_gpu": flops / median / 1e12,
        "mfu": flops / median / 989e12, "loss": loss.item(), **memory, **exposed, **({"why": why} if why else {}),
    }  # fmt: skip


def _also_configure(zero: dict[str, Any]) -> None:
    """More keys of DeepSpeed's ``zero_optimization`` than our engine sets. Its groups for hpZ are made once: our engine
    calls ``zero.Init`` for each block, and DeepSpeed refuses a second time."""
    from deepspeed.utils import groups

    from parallel import deepspeed

    create = groups._create_zero_param_parallel_group
    groups._create_zero_param_parallel_group = lambda size: (
        None if groups._get_zero_param_intra_parallel_group() else create(size)
    )

    ours = deepspeed._config

    def config(
        stage: int, options: ParallelOptions, dtype: torch.dtype, clip_norm: float | None, numel: int
    ) -> dict[str, Any]:
        made = ours(stage, options, dtype, clip_norm, numel)
        return made | {"zero_optimization": made["zero_optimization"] | zero}

    deepspeed._config = config


def _step(engine: Engine, rows: Tensor, where: Rank) -> Tensor:
    engine.expect(1e-5)
    loss = engine.forward_backward(rows[:, :-1], rows[:, 1:], scale=1 / where.world, first=True, last=True)
    engine.step(1e-5, CLIP)
    return loss


def _meet(where: Rank) -> None:
    """Every rank has finished what it was given."""
    if where.device.type == "cuda":
        torch.cuda.synchronize()
    if where.world > 1:
        dist.barrier()


def _exposed_s(engine: Engine, rows: Tensor, where: Rank) -> dict[str, float]:
    """Of two profiled steps: seconds a step in NCCL's kernels, and those of them in which no other kernel ran."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(2):
            _step(engine, rows, where)
        torch.cuda.synchronize()
    kernels = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    nccl = list(_union((e.time_range.start, e.time_range.end) for e in kernels if "nccl" in e.name.lower()))
    other = list(_union((e.time_range.start, e.time_range.end) for e in kernels if "nccl" not in e.name.lower()))
    both = sum(stop - start for start, stop in _union([*nccl, *other]))
    alone = both - sum(stop - start for start, stop in other)
    in_nccl = sum(stop - start for start, stop in nccl)
    return {"communication_s": in_nccl / 2e6, "exposed_s": alone / 2e6}


def _union(spans: Any) -> Iterator[tuple[float, float]]:
    """Intervals that overlap, as one."""
    current: tuple[float, float] | None = None
    for start, stop in sorted(spans):
        if current is None or start > current[1]:
            if current is not None:
                yield current
            current = start, stop
        else:
            current = current[0], max(current[1], stop)
    if current is not None:
        yield current


# ------------------------------------------------------------------------------------------------------------- ranks

SECTIONS = {"check": check, "time": measure}


def main() -> None:
    cases = json.loads(sys.argv[1])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = cases[0]["device"] == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=120))
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    references: dict[str, Any] = {}
    for number, case in enumerate(cases):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        torch.compiler.reset()
        start = time.perf_counter()
        try:
            row = SECTIONS[case["section"]](case, Rank(rank, world, device), references)
        except BaseException as error:
            traceback.print_exc()
            with suppress(OSError):
                print("FAILED " + json.dumps({"case": number, "error": f"rank {rank}: {error}"[:400]}), flush=True)
            os._exit(1)
        if rank == 0:
            print("ROW " + json.dumps({"case": number, "wall_s": time.perf_counter() - start, **row}), flush=True)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
