"""Long sequences on one GPU: activations swapped beside activations recomputed, with fp32 master states on the host.

    python benchmarks/long_context.py [--cases long sweep vary ladder short24 short32] [--budget-s 460] [--nvme FOLDER]

long     4b, 1 x 131072, 80 GiB of GPU memory (less on a smaller card): the kernel limit, which is the same products and
         attention alone; swapped; checkpointed, which recomputes all; `save_on_cpu` where host memory would hold it
sweep    3b's blocks, 1 x 32768: what `auto` chooses beside each α of a sweep
vary     1b, lengths drawn at random: reserved over allocated, beside PyTorch's allocator as it comes
ladder   1b and 3b within 24 GiB, the tokens doubling from 16384 until it does not fit or the time is up
short24  3b, 4 x 4096, within 24 GiB, beside the Hugging Face Llama that keeps all: on a card that holds its 88 GiB
short32  3b, 1 x 32768, beside the Hugging Face Llama checkpointed

Each run is a process of its own; none begins that would not end within --budget-s, and one that takes longer than it
was given is stopped with the figures that it printed. MFU is against the GPU's dense bf16 peak. Prints a table and
writes results/long_context.json after each run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.in_memory import preset  # noqa: E402
from benchmarks.one_run import baseline, command  # noqa: E402
from benchmarks.report import gpu_watched, write_report  # noqa: E402

CASES = ("long", "sweep", "vary", "ladder", "short24", "short32")
LADDER = {"1b": (2**20, "streamed%stream^32768"), "3b": (400_000, "streamed%stream_input^32768")}
"""How far each model's ladder goes, in tokens, and how: what 1b's blocks leave fits in host memory and on a drive, of
3b's the inputs do."""
Row = dict[str, Any]


def kernel_limit(model: str, num_tokens: int) -> Row:
    """Seconds of the products and attention of a model's blocks and head alone, forward and backward."""
    import torch

    from benchmarks.activations import kernel_limit_s
    from trainer.models.attention import attention_backends

    options, device = preset(model), torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(1, num_tokens, options.dim, device=device, dtype=torch.bfloat16)
    with attention_backends(device):
        found = {"blocks_s": kernel_limit_s(options, options.num_layers, x, 1)}
        assert options.vocab_size is not None
        words, chunk = torch.randn(options.vocab_size, options.dim, device=device, dtype=torch.bfloat16), 2048
        logits = torch.randn(chunk, options.vocab_size, device=device, dtype=torch.bfloat16)
        for timed in (False, True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(0, num_tokens, chunk):
                rows = x[0, i : i + chunk]
                _ = rows @ words.t(), logits @ words, logits.t() @ rows
            torch.cuda.synchronize()
            found["head_s"] = time.perf_counter() - start if timed else 0.0
    return {"step_s": found["blocks_s"] + found["head_s"], **found}


def run(started: list[str], timeout_s: float, environment: dict[str, str]) -> Row:
    """The last RESULT of a process; without one, why, and the steps that it did print."""
    try:
        done = subprocess.run(
            started, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **environment}
        )
        out, error, ended = done.stdout, done.stderr, f"exit {done.returncode}"
    except subprocess.TimeoutExpired as late:
        out, error = (part.decode() if isinstance(part, bytes) else part or "" for part in (late.stdout, late.stderr))
        ended = f"not done within {timeout_s:.0f} s"
    found: Row = {}
    for line in out.splitlines():
        if line.startswith("RESULT"):
            found = json.loads(line.removeprefix("RESULT"))
    if found and ended == "exit 0":
        return found
    words = [line for line in error.splitlines() if "Error" in line]
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    print(out[-1500:], error[-3000:], sep="\n", flush=True)
    return {**found, "failed": words[-1][:400] if words and "exit" in ended else ended, "steps": steps[-3:]}


class Bench:
    """Runs one after the other, within a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from offload.device import peak_flops

        self.args = args
        self.rows: list[Row] = []
        self.deadline: float = time.monotonic() + args.budget_s
        device = torch.device("cuda", torch.cuda.current_device())
        self.peak = peak_flops(device, torch.bfloat16)
        self.card_gib = torch.cuda.mem_get_info()[1] / 2**30
        self.hardware = f"{torch.cuda.get_device_name()}, {self.card_gib:.0f} GiB, {os.cpu_count()} cores"

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, case: str, name: str, started: list[str], least_s: float, most_s: float, **settings: str) -> Row:
        """Run `started` where at least `least_s` are left, for at most `most_s`; a line of the table."""
        begin, limit_s = time.perf_counter(), min(most_s, self.left_s() - 3)
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **settings}
        if limit_s < least_s:
            found: Row = {"failed": f"not begun: {self.left_s():.0f} s of --budget-s left, it takes {least_s:.0f}"}
        else:
            with gpu_watched() as clock:
                found = run(started, limit_s, environment)
            found |= clock
        return self.keep(case, name, found, time.perf_counter() - begin)

    def keep(self, case: str, name: str, found: Row, taken_s: float) -> Row:
        if self.peak and "model_TFLOPs" in found:
            found["mfu"] = round(1e12 * found["model_TFLOPs"] / self.peak, 4)
        self.rows.append({"case": case, "name": name, **found, "taken_s": round(taken_s)})
        print(f"{case:14} {name:24} {taken_s:4.0f} s  {json.dumps(found)}", flush=True)
        write_report(self.args.out, self.hardware, self.rows)
        return found

    def ours(self, case: str, name: str, cap: float, steps: int, warm_up: int, least_s: float, most_s: float) -> Row:
        budget_s = min(most_s, self.left_s()) - 12
        # predicting a step of a long sequence means measuring blocks of it, 20 s at 65,536 tokens: `auto` has to
        more: Row = {"steps": steps, "warm_up": warm_up, "budget_s": budget_s, "predict": name.startswith("auto")}
        started = command(name, case, cap=cap, clip=1.0, **more)
        assert started, f"{name}: no such run"
        return self.add(case, name, started, least_s, most_s)

    # ------------------------------------------------------------------------------------------------ cases

    def long(self) -> None:
        case, cap = self.args.long_case, min(80, int(self.card_gib - 5))
        model, num_tokens = case.split(":")[0], int(case.split(":")[1])
        if self.left_s() < 20:
            return
        begin = time.perf_counter()
        limit = self.keep(case, "limit", kernel_limit(model, num_tokens), time.perf_counter() - begin)
        free_cache()
        for name in self.args.long:
            steps, warm_up = (6, 4) if name.endswith("auto") else (3, 1)  # `auto` chooses before the fourth
            found = self.ours(case, name, cap, steps, warm_up, 60, self.args.long_s)
            if "step_s" in found:
                print(f"{'':14} {name:24} {limit['step_s'] / found['step_s']:.3f} of the kernel limit", flush=True)
        options = preset(model)
        width = options.dim * 6 + 2 * options.num_kv_heads * options.head_dim + 3 * options.ffn_dim
        pinned = 2 * width * num_tokens * options.num_layers
        text = f"not run: it would pin {pinned / 2**30:.0f} GiB of host memory"
        self.keep(case, "save_on_cpu", {"failed": text}, 0.0)

    def sweep(self) -> None:
        a = self.args
        spec = {"run": "sweep", "model": a.sweep_model, "layers": a.sweep_layers, "tokens": a.sweep_tokens}
        spec |= {"alphas": a.alphas, "steps": a.sweep_steps, "budget_s": 70}
        self.add("sweep", f"{a.sweep_model} {a.sweep_tokens}", self.spec(spec), 40, 110)

    def vary(self) -> None:
        spec = {"run": "vary", "model": "1b", "from": 512, "to": self.args.vary_to, "steps": self.args.vary_steps}
        for name, allocator, more in (
            ("ours", "expandable_segments:True", {"longest_first": True}),
            ("as it comes", "expandable_segments:False", {}),
        ):
            run_s = min(self.args.vary_s, self.left_s() - 10)
            started = self.spec({**spec, "name": "streamed%swap:0.25", "budget_s": run_s - 40, **more})
            self.add("vary", name, started, 45, run_s + 5, PYTORCH_CUDA_ALLOC_CONF=allocator)

    def ladder(self) -> None:
        for model in self.args.ladder:
            most, name = LADDER[model]
            lengths = [n for n in (self.args.ladder_from << i for i in range(20)) if n < most] + [most]
            spec = {"run": "ladder", "model": model, "name": self.args.ladder_name or name, "cap": 24}
            spec |= {"from": self.args.ladder_from, "to": most, "lengths": self.args.ladder_lengths or lengths}
            if self.args.ladder_host_gb:
                spec["activations"] = {"host_bytes": int(1e9 * self.args.ladder_host_gb)}
            spec |= {"nvme": self.args.nvme} if self.args.nvme else {}
            run_s = min(self.args.ladder_s, self.left_s() - 10)
            started = self.spec({**spec, "budget_s": run_s})
            self.add("ladder", model, started, 40, run_s + 8)

    def short24(self) -> None:
        if self.card_gib < 96:
            text = f"not run: `memory` takes 88 GiB, the card has {self.card_gib:.0f}"
            self.keep("3b:4096:4", "memory", {"failed": text}, 0.0)
        else:
            self.theirs("3b:4096:4", "memory")
        for name in self.args.short:
            self.ours("3b:4096:4", name, 24, 12, 5, 50, 100)

    def short32(self) -> None:
        for name in self.args.short:
            self.ours("3b:32768:1", name, 64, 10, 5, 60, 110)
        self.theirs("3b:32768:1", "memory-ckpt")

    def theirs(self, case: str, name: str) -> None:
        self.add(case, name, baseline(name, case, cap=0, clip=1.0, steps=6), 45, 100)

    @staticmethod
    def spec(given: Row) -> list[str]:
        return [sys.executable, str(HERE / "long_runs.py"), json.dumps(given)]


def free_cache() -> None:
    """Give back what the kernel limit took: the next run is another process."""
    import torch

    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--budget-s", type=float, default=460, help="for all")
    parser.add_argument("--long-case", default="4b:131072:1")
    parser.add_argument("--long", nargs="*", default=["host%swap:0:1", "host%checkpoint"])
    parser.add_argument("--long-s", type=float, default=160, help="for each run of it")
    parser.add_argument("--sweep-model", default="3b")
    parser.add_argument("--sweep-layers", type=int, default=8)
    parser.add_argument("--sweep-tokens", type=int, default=32768)
    parser.add_argument("--sweep-steps", type=int, default=2)
    parser.add_argument("--alphas", type=float, nargs="*", default=[0, 0.25, 0.375, 0.5, 0.625, 0.75, 1])
    parser.add_argument("--vary-to", type=int, default=8192)
    parser.add_argument("--vary-steps", type=int, default=200)
    parser.add_argument("--vary-s", type=float, default=130, help="for each run of it")
    parser.add_argument("--ladder", nargs="*", default=["1b", "3b"], choices=list(LADDER))
    parser.add_argument("--ladder-name", default="", help="instead of each model's own")
    parser.add_argument("--ladder-lengths", type=int, nargs="*", help="instead of doubling from --ladder-from")
    parser.add_argument("--ladder-host-gb", type=float, default=0.0, help="of host memory for activations")
    parser.add_argument("--ladder-from", type=int, default=16384)
    parser.add_argument("--ladder-s", type=float, default=110, help="for each model")
    parser.add_argument("--nvme", default="", help="a folder for what host memory does not hold of a ladder")
    parser.add_argument("--short", nargs="*", default=["streamed+15~0.6%auto"])
    parser.add_argument("--out", default=str(HERE / "results" / "long_context.json"))
    args = parser.parse_args()
    bench = Bench(args)
    for case in args.cases:
        getattr(bench, case)()
    print(f"wrote {args.out}, {args.budget_s - bench.left_s():.0f} s", flush=True)


if __name__ == "__main__":
    main()
