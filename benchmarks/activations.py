"""Activations kept, recomputed, swapped: seconds and memory of forward and backward through a model's blocks.

    python benchmarks/activations.py [--model 4b] [--tokens 131072] [--layers 36] [--alphas 0 0.25 0.5 0.75 1]
                                     [--no-compile] [--steps 5] [--only MODE ...]

No optimizer, no head: a gradient comes in at the last block. Modes take turns in one process:
keep            everything stays (out of memory is reported as such)
checkpoint      torch.utils.checkpoint around each block
save_on_cpu     torch.autograd.graph.save_on_cpu, pinned: everything saved is copied out and in (never
                compiled, it does not keep strides)
recompute       ours: the input and attention's output stay, the rest is recomputed
input           ours: the input alone is swapped, all is recomputed
swap A          ours, with α = A
auto            ours, α chosen from measured times
The kernel limit is the time of the same matrix products and attention alone, forward and backward. Writes
benchmarks/results/activations_<device>.json.
"""

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import yaml  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from benchmarks.report import write_report  # noqa: E402
from offload.activations.blocks import Activations  # noqa: E402
from offload.options import ActivationOptions  # noqa: E402
from trainer.models.attention import attention_backends  # noqa: E402
from trainer.models.llama import Block, rotary_tables  # noqa: E402
from trainer.options import LlamaOptions  # noqa: E402


class Stack(nn.Module):
    def __init__(self, options: LlamaOptions, num_layers: int, num_tokens: int, device: torch.device) -> None:
        super().__init__()
        self.list = nn.ModuleList(Block(options, device=device, dtype=torch.bfloat16) for _ in range(num_layers))
        for p in self.parameters():
            nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
        self.cos, self.sin = rotary_tables(num_tokens, options.head_dim, options.rope_theta, device)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.list:
            x = block(x, self.cos, self.sin)
        return x


def prepare(stack: Stack, mode: str, device: torch.device, compiled: bool) -> Activations | None:
    """Wrap the blocks of a stack that has not been wrapped."""
    for block in stack.list:
        if compiled and mode != "save_on_cpu":  # what it gives back is contiguous: compiled code refuses the strides
            block.forward = torch.compile(block.forward)
        if mode == "checkpoint":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    name, _, alpha = mode.partition(" ")
    if name not in ("recompute", "input", "swap", "auto"):
        return None
    activations = Activations(ActivationOptions(mode=name, alpha=float(alpha) if alpha else None), device)
    activations.wrap(list(stack.list))
    return activations


def measure(mode: str, make: Callable[[], Stack], x: Tensor, grad: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    stack, cuda = make(), x.is_cuda
    activations = prepare(stack, mode, x.device, args.compile)
    saving = torch.autograd.graph.save_on_cpu(pin_memory=cuda) if mode == "save_on_cpu" else None
    seconds, peak = [], 0
    try:
        for _ in range(args.warm_up + args.steps):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            leaf = x.detach().requires_grad_()
            if saving is None:
                out = stack(leaf)
            else:
                with saving:
                    out = stack(leaf)
            out.backward(grad)
            del out
            if cuda:
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated()
            seconds.append(time.perf_counter() - start)
            for p in stack.parameters():
                p.grad = None
    except torch.OutOfMemoryError as error:
        return {"mode": mode, "out_of_memory": str(error).split(".")[0]}
    found: dict[str, Any] = {"mode": mode, "step_s": statistics.median(seconds[args.warm_up :])}
    if cuda:
        found |= {
            "peak_GiB": peak / 2**30,
            "reserved_over_allocated": torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated(),
        }
    if activations is not None:
        found["host_GiB"] = activations.pools.size_bytes()["host"] / 2**30
        found["alphas"] = sorted({round(c.alpha, 3) for c in activations.choices if c.mode == "swap"})
        if costs := activations.costs():
            found["block"] = vars(costs[0])
        activations.close()
    return found


def kernel_limit_s(options: LlamaOptions, num_layers: int, x: Tensor, repeats: int) -> float:
    """Seconds of the products and attention of `num_layers` blocks alone, forward and backward, one block after the
    other: a GPU has another clock in a short burst."""
    tokens, device, o = x.size(1), x.device, options
    width = (o.num_heads + 2 * o.num_kv_heads) * o.head_dim
    shapes = [(o.dim, width), (o.num_heads * o.head_dim, o.dim), (o.dim, 2 * o.ffn_dim), (o.ffn_dim, o.dim)]

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    products = [
        (random(tokens, rows), random(columns, rows) * 0.02, random(tokens, columns)) for rows, columns in shapes
    ]
    heads = (o.num_heads, o.num_kv_heads, o.num_kv_heads)
    q, k, v = (random(1, tokens, n, o.head_dim).transpose(1, 2).requires_grad_() for n in heads)

    def block() -> None:
        for a, weight, grad in products:
            _ = a @ weight.t(), grad @ weight, grad.t() @ a
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=o.num_heads != o.num_kv_heads)
        torch.autograd.grad(out, (q, k, v), out.detach())

    def seconds(num: int) -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(num):
            block()
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(1)
    return statistics.median(seconds(num_layers) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="4b")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--alphas", type=float, nargs="*", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--only", nargs="*", help="modes, such as: recompute 'swap 0.5'")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=4, help="auto chooses after three")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    fields = yaml.safe_load((HERE.parent / "conf/model" / f"{args.model}.yaml").read_text())
    options = LlamaOptions(**{k: v for k, v in fields.items() if k != "defaults"})
    num_layers = args.layers or options.num_layers
    x = torch.randn(1, args.tokens, options.dim, device=device, dtype=torch.bfloat16)
    grad = torch.randn_like(x) * 1e-4
    swaps = [f"swap {alpha:g}" for alpha in args.alphas]
    modes = args.only or ["keep", "checkpoint", "save_on_cpu", "recompute", "input", *swaps, "auto"]
    rows: list[dict[str, Any]] = []
    with attention_backends(device):
        limit_s = kernel_limit_s(options, num_layers, x, 2)
        for mode in modes:
            torch._dynamo.reset()
            make = partial(Stack, options, num_layers, args.tokens, device)
            row = measure(mode, make, x, grad, args)
            if "step_s" in row:
                row["of_kernel_limit"] = limit_s / row["step_s"]
            row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            rows.append({"model": args.model, "layers": num_layers, "tokens": args.tokens, **row})
            print(rows[-1], flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    write_report(str(HERE / f"results/activations_{device.type}.json"), hardware, rows)


if __name__ == "__main__":
    main()
