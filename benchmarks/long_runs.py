"""Runs of long_context.py that stay in one process, so that blocks are compiled once: prints RESULT and a JSON object
after each figure, the last of which stands.

    python benchmarks/long_runs.py '{"run": "ladder", "model": "1b", "from": 16384, "to": 1048576, "budget_s": 120, …}'

ladder  two steps at each length, doubling until it does not fit or the time is up, or at ``lengths``; the second is
        timed, since at a length that is new kernels are made (cuDNN's attention, indices of 64 bits), where time is
        left for it. ``nvme``: a folder for what host memory does not hold, ``nvme_bytes`` at the most;
        ``activations``: changes their options; ``trace``: a line, and RESULT, as the device comes to each block
sweep   the blocks alone: α as `auto` chooses it, then each α of a sweep, in one engine
vary    steps of lengths drawn at random, and what of the memory that PyTorch reserved was in use at the peak
"""

import json
import queue
import random
import statistics
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import torch.fx.experimental._config  # noqa: E402

from benchmarks.in_memory import preset  # noqa: E402
from benchmarks.one_run import options as options_of  # noqa: E402
from offload.activations.blocks import Activations, describe  # noqa: E402
from offload.activations.memory import link_bytes_per_s, spare_bytes  # noqa: E402
from offload.activations.plan import Choice, choose  # noqa: E402
from offload.arena import capacity_bytes  # noqa: E402
from offload.device import host_available_bytes, peak_flops  # noqa: E402
from offload.options import ActivationOptions, OffloadOptions  # noqa: E402
from parallel import OptimizerOptions, ShardedModel  # noqa: E402
from trainer.models import LanguageModel, build_model  # noqa: E402
from trainer.models.attention import attention_backends  # noqa: E402

Spec = dict[str, Any]


def open_engine(spec: Spec, seq_len: int, made_for: int) -> tuple[ShardedModel, LanguageModel, torch.device]:
    """Engine, model and device; ``fields`` of the spec change the preset. seq_len: the longest that the model takes;
    made_for: the longest that memory is made for at once."""
    from dataclasses import replace

    from trainer.build import Rank, build_engine, choose_dtype
    from trainer.job import Job
    from trainer.options import TrainOptions

    where, chosen = Rank.current(), options_of(spec["name"], "")
    assert chosen, spec["name"]
    if spec.get("cap") and where.device.type == "cuda":
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec["cap"] * 2**30 / total))
    model = replace(preset(spec["model"]), **spec.get("fields", {}))
    activations = ActivationOptions(**chosen["activations"] | spec.get("activations", {}))
    drives = {"nvme_path": [spec["nvme"]], "nvme_bytes": spec.get("nvme_bytes")} if spec.get("nvme") else {}
    job = Job(
        model=model,
        train=TrainOptions(seq_len=made_for, global_batch_size=1),
        optimizer=OptimizerOptions(lr=1e-5),
        offload=OffloadOptions(**chosen | drives | {"activations": activations}),
    )
    torch.manual_seed(0)
    torch._dynamo.config.assume_static_by_default = False  # one compilation for all lengths,
    torch.fx.experimental._config.use_duck_shape = False  # also where the first is as long as the table of positions
    dtype, _ = choose_dtype("auto", where.device)
    llama = build_model(model, vocab_size=256, seq_len=seq_len, dtype=dtype, device=where.device)
    start = time.perf_counter()
    engine = build_engine(job, llama, where, dtype, say=print)
    print(f"built in {time.perf_counter() - start:.1f} s", engine.state_bytes(), flush=True)
    assert isinstance(engine, ShardedModel)
    return engine, llama, where.device


def step_s(engine: ShardedModel, num_tokens: int, device: torch.device) -> float:
    """Seconds of one step of one sequence, from the end of the last to its own."""
    rows = torch.randint(0, 256, (1, num_tokens + 1), device=device)
    start = time.perf_counter()
    engine.expect(1e-5)
    engine.forward_backward(rows[:, :-1], rows[:, 1:], scale=1.0, first=True, last=True)
    engine.step(1e-5, 1.0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def result(found: Spec) -> None:
    print("RESULT", json.dumps(found), flush=True)


def gib(size_bytes: float) -> float:
    return round(size_bytes / 2**30, 2)


# ---------------------------------------------------------------------------------------------------- ladder


class Trace:
    """Says when the device has come to each block, from a thread of its own: the run is not held up."""

    def __init__(self, engine: ShardedModel, llama: LanguageModel, device: torch.device, found: Spec) -> None:
        self._engine, self._cuda, self._found = engine, device.type == "cuda", found
        self._marks: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()
        for number, block in enumerate(llama.blocks()):
            block.register_forward_hook(partial(self._passed, number))

    def start(self, num_tokens: int) -> None:
        """A step of so many tokens begins; what comes before the first block counts as its time."""
        self._marks.put(("start", num_tokens, None))

    def _passed(self, number: int, _: Any, __: Any, out: Any) -> None:
        self._mark("forward", number)
        out = out if isinstance(out, torch.Tensor) else out[0]
        if out.requires_grad:
            out.register_hook(lambda _: self._mark("backward", number))

    def _mark(self, what: str, number: int) -> None:
        event = torch.cuda.Event(blocking=True) if self._cuda else None
        if event is not None:
            event.record(torch.cuda.current_stream())
        self._marks.put((what, number, event))

    def _serve(self) -> None:
        while True:
            what, number, event = self._marks.get()
            if event is not None:
                event.synchronize()
            now_s = time.perf_counter()
            if what == "start":
                self._seen: Spec = {"tokens": number, "forward_s": [], "backward_s": []}
                self._begin_s = self._last_s = now_s
                continue
            taken_s, self._last_s = now_s - self._last_s, now_s
            # a backward's mark is where it begins: the time before it is that of the block above, or of the head
            self._seen[f"{what}_s"].append(round(taken_s, 2))
            if (slots := self._engine.activations.pools._slots) and (tier := slots.tier):
                self._seen |= {"written_GB": round(tier.bytes_written / 1e9, 1)}
                self._seen |= {"read_GB": round(tier.bytes_read / 1e9, 1)}
            self._seen |= {"host_free_GiB": gib(host_available_bytes())}
            if self._cuda:
                self._seen |= {"gpu_allocated_GiB": gib(torch.cuda.max_memory_allocated())}
            rest = {key: value for key, value in self._seen.items() if not isinstance(value, list)}
            does = "forward ended" if what == "forward" else "backward begins"
            print(f"{now_s - self._begin_s:7.1f} s  block {number:2} {does}, {taken_s:.2f} s  {rest}", flush=True)
            result({**self._found, "ended": "cut off", "under_way": self._seen})


def ladder(spec: Spec) -> None:
    deadline = time.perf_counter() + spec["budget_s"]
    engine, llama, device = open_engine(spec, spec["to"], spec["from"])
    peak = peak_flops(device, torch.bfloat16)
    rungs: list[Spec] = []
    found: Spec = {"model": spec["model"], "name": spec["name"], "rungs": rungs, "ended": "longest reached"}
    found |= {key: spec[key] for key in ("fields", "activations", "nvme") if key in spec}
    last_s, lengths = 0.0, spec.get("lengths") or doubled(spec["from"], spec["to"])
    trace = Trace(engine, llama, device, found) if spec.get("trace") else None

    def step(num_tokens: int) -> float:
        if trace:
            trace.start(num_tokens)
        return step_s(engine, num_tokens, device)

    with attention_backends(device):
        print(f"compiled in {step(spec['from']):.1f} s", flush=True)
        for num_tokens in lengths:
            left_s = deadline - time.perf_counter()
            if 3.8 * last_s > left_s:  # what attention makes of twice the tokens
                found["ended"] = f"{num_tokens} tokens would not end within {left_s:.0f} s"
                break
            try:
                engine.activations.make_for(num_tokens)
                made_s = step(spec["from"])  # host memory and buffers, which are not to be timed
                print(f"memory made in {made_s:.1f} s {engine.activations.pools.size_bytes()}", flush=True)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                first_s = last_s = step(num_tokens)
                if warm := 1.1 * first_s < deadline - time.perf_counter():
                    last_s = step(num_tokens)
            except (torch.OutOfMemoryError, OSError, MemoryError, ValueError) as error:
                found["ended"] = f"{num_tokens} tokens: {type(error).__name__}: {str(error)[:200]}"
                break
            flops = llama.flops_per_token(num_tokens) * num_tokens
            rung = {"tokens": num_tokens, "step_s": round(last_s, 3), "mfu": peak and round(flops / last_s / peak, 4)}
            rung |= {"first_s": round(first_s, 3), "warm": warm}
            sizes = engine.activations.pools.size_bytes()
            rung |= {"host_GiB": gib(sizes["host"]), "nvme_GiB": gib(sizes["nvme"])}
            if device.type == "cuda":
                rung |= {"gpu_GiB": gib(torch.cuda.max_memory_reserved())}
                rung |= {"gpu_allocated_GiB": gib(torch.cuda.max_memory_allocated())}
            rungs.append(rung)
            print(rung, flush=True)
            result(found)
    result(found)


def doubled(first: int, last: int) -> list[int]:
    """From `first`, up to `last`."""
    return [first << n for n in range((last // first).bit_length())]


# ---------------------------------------------------------------------------------------------------- sweep


def sweep(spec: Spec) -> None:
    """The best α by a sweep beside what `auto` would choose, in the same blocks and in turns."""
    from benchmarks.activations import Stack, kernel_limit_s

    options, num_layers, tokens = preset(spec["model"]), spec["layers"], spec["tokens"]
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    deadline = time.perf_counter() + spec["budget_s"]
    x = torch.randn(1, tokens, options.dim, device=device, dtype=torch.bfloat16)
    grad = torch.randn_like(x) * 1e-4
    stack = Stack(options, num_layers, tokens, device)
    if device.type == "cuda":
        for block in stack.list:
            block.forward = torch.compile(block.forward)
    swap = Activations(ActivationOptions(mode="swap", alpha=0.0), device)
    swap.wrap(list(stack.list))

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        stack(x.detach().requires_grad_()).backward(grad)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with attention_backends(device):
        limit_s = kernel_limit_s(options, num_layers, x, 2)
        swap.measure()
        for _ in range(4):
            once()
        costs, kept = swap.costs(), [c for c in swap.choices if c.mode == "keep"]
        rate, most = link_bytes_per_s(device), int(0.8 * capacity_bytes())
        # what `auto` does where no memory is left over on the device, or it would keep all of so few blocks
        auto = choose(costs, link_bytes_per_s=rate, host_bytes=most, keep_last=0) + kept
        found: Spec = {"model": spec["model"], "layers": num_layers, "tokens": tokens, "limit_s": round(limit_s, 4)}
        found |= {"chosen": describe(auto), "link_GB_s": round(rate / 1e9, 1), "block": vars(costs[0]), "seconds": {}}
        print(found, flush=True)
        away = num_layers - len(kept)
        sweeps = {f"{alpha:g}": [Choice("swap", alpha)] * away + kept for alpha in sorted(spec["alphas"], reverse=True)}
        sweeps |= {"recompute": [Choice("recompute")] * away + kept, "auto": auto}
        taken: dict[str, list[float]] = {name: [] for name in sweeps}
        for turn in range(spec["steps"]):  # in turns: a machine that slows down slows all
            for name, choices in sweeps.items():
                if turn and time.perf_counter() > deadline:
                    break
                swap.set(choices)
                once()
                taken[name].append(once())
                found["seconds"] = {n: round(statistics.median(s), 4) for n, s in taken.items() if s}
        best = min(s for name, s in found["seconds"].items() if name not in ("auto", "recompute"))
        found["auto_over_best"] = round(found["seconds"]["auto"] / best, 4)
        found["of_kernel_limit"] = round(limit_s / found["seconds"]["auto"], 4)
        found["spare_GiB"] = gib(spare_bytes(device) or 0)
        result(found)
    swap.close()


# ---------------------------------------------------------------------------------------------------- varying lengths


def reserved_by_stream() -> list[Spec]:
    """What each stream's pool holds now: memory that one stream has freed serves no other."""
    found: dict[int, Spec] = {}
    for segment in torch.cuda.memory_snapshot():
        row = found.setdefault(segment["stream"], {"reserved_GiB": 0.0, "allocated_GiB": 0.0})
        row["reserved_GiB"] += segment["total_size"] / 2**30
        row["allocated_GiB"] += segment["allocated_size"] / 2**30
    return [{key: round(value, 3) for key, value in row.items()} for row in found.values()]


def vary(spec: Spec) -> None:
    deadline = time.perf_counter() + spec["budget_s"]
    engine, _, device = open_engine(spec, spec["to"], spec["to"] if spec.get("longest_first") else 1)
    lengths = random.Random(0)
    done: list[int] = []
    taken: list[float] = []
    cuda = device.type == "cuda"
    with attention_backends(device, lengths_vary=True):
        if spec.get("longest_first"):
            step_s(engine, spec["to"], device)
        for _ in range(spec["steps"]):
            done.append(lengths.randint(spec["from"], spec["to"]))
            taken.append(round(step_s(engine, done[-1], device), 3))
            if time.perf_counter() > deadline:
                break
    found: Spec = {"model": spec["model"], "name": spec["name"], "steps": len(done), "longest": max(done)}
    found |= {"first_s": taken[:3], "median_s": statistics.median(taken), "slowest_after_s": max(taken[3:], default=0)}
    if cuda:
        stats = torch.cuda.memory_stats()
        found |= {
            "allocated_GiB": gib(stats["allocated_bytes.all.peak"]),
            "reserved_GiB": gib(stats["reserved_bytes.all.peak"]),
            "reserved_over_allocated": round(
                stats["reserved_bytes.all.peak"] / max(1, stats["allocated_bytes.all.peak"]), 4
            ),
            "retries": stats["num_alloc_retries"],
            "segments": stats["segment.all.current"],
            "by_stream": reserved_by_stream(),
        }
    result(found)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    {"ladder": ladder, "sweep": sweep, "vary": vary}[given["run"]](given)
