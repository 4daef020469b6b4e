"""Runs the engine in worlds of several gloo processes and prints, case by case, how far it is from one plain process.

    python worlds.py WORLD < cases.json

A case is ``{"levels": {...}, "parallel": {...}, "accumulation": 4, …}``; rank 0 answers with a JSON object a line.
"""

import json
import os
import sys
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from offload import shard as away_shard
from offload.options import OffloadOptions
from offload.state import MASTER, filling
from parallel import Mesh, OptimizerOptions, ParallelOptions, Placement, shard

VOCAB, WIDTH, ROWS, LENGTH, STEPS = 19, 24, 96, 5, 20


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.gain = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(torch.tanh(self.up(self.norm(x))))


class Head(nn.Module):
    def __init__(self, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.weight = weight if weight is not None else nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.3)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.norm(x) @ self.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Toy(nn.Module):
    """Odd shapes, a scalar, a tied weight, a frozen one, ones that get no gradient, a buffer."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, hidden) for hidden in (37, 37, 41))
        self.head = Head(self.embed.weight if tied else None)
        self.offset = nn.Parameter(torch.randn(WIDTH) * 0.1)
        self.register_buffer("scale", torch.full((1,), 0.7))
        self.blocks[1].up.weight.requires_grad_(False)
        for parameter in self.blocks[2].parameters():
            parameter.requires_grad_(False)

    def units(self) -> list[nn.Module]:
        return [self.embed, *self.blocks, self.head]

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x * self.scale.to(x.dtype) + self.offset
        for block in self.blocks:
            x = block(x)
        return self.head(x, targets)


def batch(step: int) -> torch.Tensor:
    return torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def make(case: dict) -> Toy:
    torch.manual_seed(case.get("seed", 0))
    model = Toy(case.get("tied", True))
    if case.get("empty"):  # flat buffers of nothing else: of the frozen ones of units, of the matrices of the root
        for unit in model.units():
            unit.nothing = nn.Parameter(torch.empty(0), requires_grad=False)
        model.no_rows = nn.Parameter(torch.empty(0, 3))
    if case.get("strides"):  # 12 KB for who does not look at them
        model.register_buffer("one", torch.ones(1).expand(3000))
        model.register_buffer("columns", torch.arange(6.0).view(2, 3).T)
        model.blocks[0].columns = model.columns
    return model


def plain(case: dict) -> dict[str, torch.Tensor]:
    """The same training by one process, the whole batch at once."""
    model, options = make(case), OptimizerOptions(**case.get("optimizer", {}))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if (p.ndim >= 2) == decays], "weight_decay": options.weight_decay * decays}
        for decays in (True, False)
    ]
    if options.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(options.beta1, options.beta2), eps=options.eps)
    else:
        optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=options.momentum)
    norms = []
    for step in range(STEPS):
        rows = batch(step)
        model(rows[:, :-1], rows[:, 1:]).backward()
        norms.append(nn.utils.clip_grad_norm_(trained, case.get("clip", 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | {"norms": torch.stack(norms)}


def build(case: dict):
    mesh = Mesh.of(case.get("levels", {}), rank=dist.get_rank(), world=dist.get_world_size())
    options = ParallelOptions(**case["parallel"])
    source = {name: p.detach().clone().flatten() for name, p in make(case).named_parameters()}
    model = make(case)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    if case.get("tied", True):
        model.head.weight = model.embed.weight
    offload = OffloadOptions(**case.get("offload", {}))
    engine = shard(
        model, mesh, Placement.of(options, mesh.num_levels),
        units=model.units(), initial=lambda name, kind, start, stop: source[name][start:stop],
        optimizer=OptimizerOptions(**case.get("optimizer", {})), options=options,
        dtype=torch.bfloat16 if case.get("bf16") else torch.float32, device=torch.device("cpu"),
        offload=offload,
        recompute=list(model.blocks) if case.get("recompute") else (),
        compile=list(model.blocks) if case.get("compile") else (),
    )  # fmt: skip
    if offload.states == "nvme" and offload.host_bytes:
        assert {flat.away.on_nvme for flat in engine._offloader.flats} == {False, True}, "a part in host memory"
    return engine


def train(engine, case: dict, steps: range) -> list[torch.Tensor]:
    rank, world, accumulation = dist.get_rank(), dist.get_world_size(), case.get("accumulation", 1)
    norms = []
    for step in steps:
        engine.expect(1e-2)
        micro_batches = batch(step).chunk(world * accumulation)[rank * accumulation : (rank + 1) * accumulation]
        for i, rows in enumerate(micro_batches):
            engine.forward_backward(
                rows[:, :-1], rows[:, 1:], scale=1 / (world * accumulation), first=i == 0, last=i == accumulation - 1
            )
        norms.append(engine.step(1e-2, case.get("clip", 0.5)))
        if case.get("evaluate"):
            engine.evaluate(batch(step)[:2, :-1], batch(step)[:2, 1:])
    return norms


def gathered(engine) -> dict[tuple[str, str], torch.Tensor]:
    """All state, from every rank's pieces; fails where one element is missing or given twice."""
    mine = [(p.name, p.kind, p.start, p.stop, p.shape, p.tensor.clone()) for p in engine.pieces()]
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    state: dict = {}
    seen: dict = {}
    for name, kind, start, stop, shape, tensor in (piece for pieces in every for piece in pieces):
        whole = state.setdefault((name, kind), torch.full(shape, torch.nan, dtype=tensor.dtype))
        whole.view(-1)[start:stop] = tensor
        count = seen.setdefault((name, kind), torch.zeros(whole.numel(), dtype=torch.int64))
        count[start:stop] += 1
    assert all((count == 1).all() for count in seen.values()), "each element exactly once"
    return state


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def with_weights(engine) -> set:
    """The units whose weights are in a buffer, or on their way there."""
    return {unit for unit, _ in engine.weights._owners.values()}


def watch_gathered(engine) -> list[int]:
    """Each time after a gather began: how many units, the root aside, have gathered weights."""
    counts, start = [], engine.weights.start_gather

    def counted(unit) -> None:
        start(unit)
        counts.append(sum(owner is not engine.root for owner in with_weights(engine)))

    engine.weights.start_gather = counted
    return counts


def equality(case: dict) -> dict:
    engine = build(case)
    counts = watch_gathered(engine)
    norms = train(engine, case, range(STEPS))
    state, reference = gathered(engine), plain(case)
    differences = {n: distance(state[n, MASTER], p) for n, p in reference.items() if n != "norms" and p.numel()}
    worst = max(differences, key=lambda name: differences[name])
    return {
        "worst": worst, "difference": differences[worst], "norms": distance(torch.stack(norms), reference["norms"]),
        "alive": len(with_weights(engine)), "most_alive": max(counts, default=0),
        "state_bytes": engine.state_bytes(),
    }  # fmt: skip


def against_ddp(case: dict) -> dict:
    """The same training by torch's DistributedDataParallel, rank for rank the same micro-batches."""
    engine = build(case)
    train(engine, case, range(STEPS))
    model, options = make(case), OptimizerOptions()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if (p.ndim >= 2) == decays], "weight_decay": options.weight_decay * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(options.beta1, options.beta2), eps=options.eps)
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        rows = batch(step).chunk(world)[rank]
        ddp(rows[:, :-1], rows[:, 1:]).backward()
        nn.utils.clip_grad_norm_(trained, case.get("clip", 0.5))
        optimizer.step()
        optimizer.zero_grad()
    state = gathered(engine)
    return {"difference": max(distance(state[n, MASTER], p.detach()) for n, p in model.named_parameters())}


def resumed(case: dict) -> dict:
    """Half of the steps, the state carried over to another placement, the other half: against all in one go."""
    whole = build(case)
    train(whole, case, range(STEPS))
    first = build(case)
    train(first, case, range(STEPS // 2))
    state = gathered(first)
    second = build(case | {"seed": 1, **case["then"]})
    second.load(filling(lambda name, kind, start, stop: state[name, kind].view(-1)[start:stop]), moments=True)
    second.updates = first.updates
    train(second, case | case["then"], range(STEPS // 2, STEPS))
    a, b = gathered(second), gathered(whole)
    return {
        "difference": max(distance(a[key].float(), b[key].float()) for key in b),
        "bitwise": all(torch.equal(a[k], b[k]) for k in b),
    }


def quantized(case: dict) -> dict:
    """How far quantized transport takes training from a plain process, and whether all ranks compute with one model."""
    engine = build(case)
    norms = train(engine, case, range(STEPS))
    state, reference = gathered(engine), plain(case)
    used = {}
    for unit in engine._all:
        engine.weights.use(unit)
        used |= {n: p.detach().clone() for n, p in engine.model.named_parameters() if p.numel() and not p.isnan().any()}
        engine.weights.release(unit)
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, used)
    masters = {name: state[name, MASTER] for name in used}
    return {
        "names": sorted(used),
        "one_model": all(torch.equal(theirs[n], used[n]) for theirs in every for n in used),
        "from_master": max(distance(used[n].float(), masters[n]) for n in used),
        "exact": [n for n in used if torch.equal(used[n].float(), masters[n])],
        "difference": max(distance(state[n, MASTER], reference[n]) for n in reference if n != "norms"),
        "norms": distance(torch.stack(norms), reference["norms"]),
        "residuals": engine.state_bytes()["residuals"],
        "alive": len(with_weights(engine)),
    }


def alike(case: dict) -> dict:
    """Whether training with each of the `offloads` gives the same bits."""
    found = []
    for offload in case["offloads"]:
        engine = build(case | {"offload": offload})
        norms = train(engine, case, range(STEPS))
        found.append(gathered(engine) | {("norms", ""): torch.stack(norms)})
        engine.close()
    first = found[0]
    return {
        "different": [i for i, state in enumerate(found) if any(not torch.equal(state[k], first[k]) for k in first)]
    }


def skipping(case: dict) -> dict:
    """Steps that are not accepted, one with gradients that are no numbers, against a training without them."""
    bad, accumulation = {4: float("nan"), 7: 1.0, 8: float("inf")}, case.get("accumulation", 1)
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for steps in (range(STEPS), [step for step in range(STEPS) if step not in bad]):
        engine = build(case)
        for step in steps:
            engine.expect(1e-2)
            micro_batches = batch(step).chunk(world * accumulation)[rank * accumulation : (rank + 1) * accumulation]
            for i, rows in enumerate(micro_batches):
                scale = bad.get(step, 1.0) / (world * accumulation)
                engine.forward_backward(
                    rows[:, :-1], rows[:, 1:], scale=scale, first=i == 0, last=i == accumulation - 1
                )
            engine.step(1e-2, 0.5, lambda norm, step=step: step not in bad and bool(norm.isfinite()))
        found.append(gathered(engine))
        updates = engine.updates
        engine.close()
    kept, without = found
    return {
        "different": [k for k in without if not torch.equal(kept[k], without[k])],
        "updates": updates,
        "finite": all(bool(tensor.isfinite().all()) for tensor in kept.values()),
    }


CHECKS = {
    "alike": alike,
    "skipping": skipping,
    "equality": equality,
    "resumed": resumed,
    "ddp": against_ddp,
    "quantized": quantized,
}


def run(rank: int, world: int, cases: list[dict], init: str) -> None:
    torch.set_num_threads(1)
    away_shard.CHUNK = 1000  # or the toy's states would be one chunk
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for case in cases:
        result = CHECKS[case.get("check", "equality")](case)
        if rank == 0:
            print(json.dumps({"case": case, **result}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    world, cases = int(sys.argv[1]), json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            if (child := os.fork()) == 0:  # torch is imported once for all, and has started no thread yet
                try:
                    run(rank, world, cases, folder + "/init")
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                sys.stdout.flush()
                os._exit(0)
            children.append(child)
        failed = [status for status in (os.waitpid(child, 0)[1] for child in children) if status]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
