"""The engine on one GPU: its kernel, its streams, and the equality with a plain loop."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from offload.options import OffloadOptions
from parallel import Mesh, OptimizerOptions, ParallelOptions, Placement, shard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
WIDTH, LAYERS, STEPS = 512, 5, 6


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS))
        self.gain = nn.Parameter(torch.ones(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return (x * self.gain[3]).square().mean().float()


class SelfMesh(Mesh):
    """One rank that talks to itself: every collective really runs, on the side streams."""

    def group(self, first: int, last: int) -> dist.ProcessGroup | None:
        return dist.group.WORLD if last > first else None

    def wide(self, level: int) -> bool:
        return True


@pytest.fixture
def nccl(tmp_path):
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses(engine_of_model, dtype: torch.dtype, accumulation: int) -> tuple[list[float], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Stack().cuda()
    step, weights = engine_of_model(model, dtype)
    found = []
    for i in range(STEPS):
        x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(i)).to("cuda", dtype)
        found.append(step(x.chunk(accumulation)))
    return found, weights()


def plain(model, dtype):
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    model.to(dtype)
    groups = [
        {"params": [m for m in masters if (m.ndim >= 2) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(parts):
        total = 0.0
        sums = [torch.zeros_like(m) for m in masters]
        for x in parts:
            loss = model(x)
            (loss / len(parts)).backward()
            total += loss.item() / len(parts)
            for s, p in zip(sums, model.parameters(), strict=True):
                s += p.grad
                p.grad = None
        for m, s in zip(masters, sums, strict=True):
            m.grad = s
        nn.utils.clip_grad_norm_(masters, 0.01)
        optimizer.step()
        with torch.no_grad():
            for p, m in zip(model.parameters(), masters, strict=True):
                p.copy_(m)
        return total

    return step, lambda: masters


def sharded(placement: str, mesh: Mesh, offload: dict | None = None, **options):
    def make(model, dtype):
        source = {name: p.detach().clone().flatten() for name, p in model.named_parameters()}
        shapes = {name: p.shape for name, p in model.named_parameters()}
        config = ParallelOptions(placement=placement, **options)
        engine = shard(
            model, mesh, Placement.of(config, mesh.num_levels), units=list(model.layers),
            initial=lambda name, kind, start, stop: source[name][start:stop], optimizer=OptimizerOptions(),
            options=config, dtype=dtype, device=torch.device("cuda"), offload=OffloadOptions(**offload or {}),
        )  # fmt: skip

        def step(parts):
            total, last = 0.0, len(parts) - 1
            engine.expect(1e-3)
            for i, x in enumerate(parts):
                loss = engine.forward_backward(x, scale=1 / len(parts), first=i == 0, last=i == last)
                total += loss.item() / len(parts)
            engine.step(1e-3, 0.01)
            return total

        def weights():
            state = {name: torch.empty(shape, device="cuda") for name, shape in shapes.items()}
            for piece in engine.pieces():
                if piece.kind == "master":
                    state[piece.name].view(-1)[piece.start : piece.stop] = piece.tensor
            engine.close()
            return list(state.values())

        return step, weights

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("placement", ["ddp", "zero1", "zero2", "zero3", "topo"])
def test_equals_a_plain_loop_with_collectives_on_streams(nccl, placement, accumulation, dtype) -> None:
    expected = losses(plain, dtype, accumulation)
    found = losses(sharded(placement, SelfMesh({"node": 1, "gpu": 1}), prefetch_units=2), dtype, accumulation)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a - b).norm() / b.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("placement", ["ddp", "zero1", "zero3", "hsdp", "topo"])
def test_quantized_on_streams_is_near_a_plain_loop_and_repeats(nccl, placement, overlap, dtype) -> None:
    """Every gather, reduction and refresh packed, and the same bits again: a race between streams would show."""
    mesh = SelfMesh({"node": 1, "gpu": 1})
    options = {"quantize": "all", "weights_block": 128, "error_feedback": True, "overlap": overlap}
    expected = losses(plain, dtype, 2)
    found, again = (losses(sharded(placement, mesh, **options), dtype, 2) for _ in range(2))
    assert found[0] == again[0] and all(map(torch.equal, found[1], again[1]))
    assert not all(map(torch.equal, found[1], expected[1]))
    assert found[0] == pytest.approx(expected[0], rel=0.02)
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a - b).norm() / b.norm() < 0.05


@pytest.mark.parametrize("accumulation", [1, 4])
def test_equals_a_plain_loop_alone(accumulation) -> None:
    expected = losses(plain, torch.bfloat16, accumulation)
    found = losses(sharded("zero3", Mesh({"gpu": 1})), torch.bfloat16, accumulation)
    assert found[0] == pytest.approx(expected[0], rel=2e-3)


HOST = {"states": "host", "threads": 4}
STREAMED = HOST | {"weights": "host"}
SPECULATE = HOST | {"update": "speculate", "speculate_share": 1.0}
FIRST = {"update": "weights_first"}
HALF = SPECULATE | {"weights": "host", "speculate_share": 0.5}


@pytest.mark.parametrize("placement", ["zero1", "zero3"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_states_and_weights_away_change_no_bit(nccl, disk_folder, placement, accumulation) -> None:
    """Host memory, part of it on the device, NVMe, weights streamed or on NVMe, too: near a plain loop, alike where all
    are away."""
    nvme = {"states": "nvme", "nvme_path": [str(disk_folder)], "threads": 4}
    weights = nvme | {"weights": "nvme"}  # of zero3 alone: with the others this mesh has ranks that refresh
    mesh = SelfMesh({"node": 1, "gpu": 1})
    expected = losses(plain, torch.bfloat16, accumulation)
    found = [
        losses(sharded(placement, mesh, offload), torch.bfloat16, accumulation)
        for offload in (
            HOST,
            STREAMED,
            nvme,
            nvme | {"weights": "host"},
            HOST | FIRST,
            STREAMED | FIRST,
            SPECULATE,
            HALF,
            *([weights, weights | {"host_bytes": 30_000_000}] if placement == "zero3" else []),
            HOST | {"gpu_bytes": 10_000_000},
        )
    ]
    for other in found:
        assert other[0] == pytest.approx(expected[0], rel=2e-3)
        for a, b in zip(other[1], expected[1], strict=True):
            assert (a - b).norm() / b.norm() < 2e-3
    for other in found[1:-1]:
        assert other[0] == found[0][0] and all(map(torch.equal, other[1], found[0][1]))


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 1000, 1 << 20, (1 << 20) + 3])
def test_adamw_kernel_equals_torch(numel, grad_dtype) -> None:
    from parallel.kernels import adamw_step

    torch.manual_seed(numel)
    weight = torch.randn(numel, device="cuda")
    reference = weight.double().requires_grad_()
    optimizer = torch.optim.AdamW([reference], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    exp_avg, exp_avg_sq = torch.zeros_like(weight), torch.zeros_like(weight)
    out, scale = torch.full((numel,), torch.nan, device="cuda", dtype=torch.bfloat16), torch.tensor(0.3, device="cuda")
    for updates in range(1, 6):
        grad = torch.randn(numel, device="cuda").to(grad_dtype)
        adamw_step(
            weight, exp_avg, exp_avg_sq, grad, out, scale,
            lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, updates=updates,
        )  # fmt: skip
        reference.grad = grad.double() * 0.3
        optimizer.step()
    assert (weight - reference.detach()).norm() / reference.detach().norm() < 1e-6
    assert torch.equal(out, weight.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 8191, (1 << 24) + 5])
def test_sum_of_squares_equals_double_precision(numel, dtype) -> None:
    from parallel.kernels import sum_of_squares

    values = torch.randn(numel, device="cuda").to(dtype)
    assert sum_of_squares(values).item() == pytest.approx(values.double().square().sum().item(), rel=1e-6)
