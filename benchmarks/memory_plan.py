"""The memory plan of a step: how large, how near its lower bounds, in how many seconds.

    python benchmarks/memory_plan.py [--tokens 8192 131072] [--time-limit-s 10]

Each model of `conf/model` is recorded under fake tensors, layer and head, and its step planned with everything kept,
with everything swapped, and swapped with weights that stream in. Then sets of random requests, on which best fit is
often not enough: what it and the program reach. One core. Writes benchmarks/results/memory_plan.json.
"""

import argparse
import platform
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import yaml  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from benchmarks.report import write_report  # noqa: E402
from offload.plan import Head, Layer, Request, place, plan_step, record_head, record_layer  # noqa: E402
from trainer.models.llama import Block, rotary_tables  # noqa: E402
from trainer.models.llama import Head as LlamaHead  # noqa: E402
from trainer.options import LlamaOptions  # noqa: E402

MODELS = ("1b", "4b", "8b", "70b")


def options_of(model: str) -> LlamaOptions:
    fields = yaml.safe_load((HERE.parent / "conf/model" / f"{model}.yaml").read_text())
    fields.pop("defaults")
    return LlamaOptions(**fields)


def record(options: LlamaOptions, num_tokens: int) -> tuple[Layer, Head]:
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    assert options.vocab_size is not None
    with FakeTensorMode():
        cos, sin = rotary_tables(num_tokens, options.head_dim, options.rope_theta, cpu)
        x = torch.empty(1, num_tokens, options.dim, dtype=bf16)
        layer = record_layer(Block(options, device=cpu, dtype=bf16), x, cos, sin)
        head = LlamaHead(options, options.vocab_size, device=cpu, dtype=bf16)
        return layer, record_head(head, x, torch.zeros(1, num_tokens, dtype=torch.int64))


def plan_models(all_tokens: list[int], time_limit_s: float) -> list[dict[str, Any]]:
    rows = []
    for model in MODELS:
        options = options_of(model)
        for num_tokens in all_tokens:
            start = time.perf_counter()
            layer, head = record(options, num_tokens)
            record_s = time.perf_counter() - start
            away = replace(layer, swap_input=True, swap_saved=frozenset(r.name for r in layer.saved))
            block = Block(options, device=torch.device("meta"), dtype=torch.bfloat16)
            streamed = replace(away, weight_bytes=sum(p.nbytes for p in block.parameters()))
            for name, one in (("kept", layer), ("swapped", away), ("swapped, weights streamed", streamed)):
                plan = plan_step([one] * options.num_layers, head, time_limit_s=time_limit_s)
                rows.append(
                    {
                        "model": model, "layers": options.num_layers, "tokens": num_tokens, "activations": name,
                        "GiB": round(plan.step.size_bytes / 2**30, 3), "waste": round(plan.step.waste, 5),
                        "waste_of_arenas": [round(a.placement.waste, 5) for a in list(plan.arenas.values())[:2]],
                        "above_flat_bound": round(plan.step.size_bytes / plan.flat_bound_bytes - 1, 4),
                        "record_s": round(record_s, 2), "plan_s": round(plan.seconds, 2), "solver": plan.step.solver,
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def plan_random(num_sets: int, num_requests: int, time_limit_s: float) -> dict[str, Any]:
    """Sets whose load is full at every step, as far as it goes: the hard ones."""
    generator, greedy, both, proven, used = random.Random(0), [], [], 0, 0
    for _ in range(num_sets):
        requests: list[Request] = []
        load, steps = [0] * 24, 24
        for _ in range(50 * num_requests):
            first = generator.randrange(steps)
            last = min(steps - 1, first + generator.randrange(8))
            size = generator.randint(1, 24)
            if len(requests) < num_requests and max(load[first : last + 1]) + size <= 64:
                load[first : last + 1] = [have + size for have in load[first : last + 1]]
                requests.append(Request(f"r{len(requests)}", "random", size, first, last))
        one, two = (place(requests, align=1, time_limit_s=limit) for limit in (0.0, time_limit_s))
        greedy.append(one.size_bytes / two.lower_bound_bytes - 1)
        both.append(two.waste)
        proven += two.proven
        used += "MIP" in two.solver
    return {
        "random_requests": num_requests, "sets": num_sets, "time_limit_s": time_limit_s,
        "one_round_of_best_fit_waste": [round(f(greedy), 4) for f in (statistics.mean, max)],
        "place_waste": [round(f(both), 4) for f in (statistics.mean, max)], "proven_smallest": proven,
        "program_used": used,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument("--time-limit-s", type=float, default=10.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = plan_models(args.tokens, args.time_limit_s)
    for num_requests in (16, 32, 64):
        rows.append(plan_random(10, num_requests, 2.0))
        print(rows[-1], flush=True)
    hardware = f"{platform.machine()}, one core"
    write_report(str(HERE / "results/memory_plan.json"), hardware, rows)


if __name__ == "__main__":
    main()
