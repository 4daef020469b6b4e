"""A run whose activations leave is the run that keeps them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx.experimental._config

from offload.options import ActivationOptions, OffloadOptions
from parallel.unit import TrainableFlat
from trainer.build import Rank, build_engine
from trainer.job import Job
from trainer.loop import Trainer
from trainer.models import build_model
from trainer.options import DataOptions, HFOptions, LlamaOptions, LoggerOptions, RunOptions, TrainOptions

MODEL = LlamaOptions(dim=64, ffn_dim=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16)
AWAY = pytest.param({"states": "host", "weights": "host"}, marks=pytest.mark.slow)


def run(
    root: Path,
    name: str,
    data: Path,
    *,
    model: Any = MODEL,
    micro: int | None = 2,
    offload: dict[str, Any] | None = None,
    **activations: Any,
) -> tuple[list[float], str]:
    """The losses, and what else was told."""
    job = Job(
        model=model,
        data=DataOptions(source="text", paths=[str(data)], valid_fraction=0, cache_dir=str(root / "cache")),
        train=TrainOptions(
            steps=6, seq_len=32, global_batch_size=4, micro_batch_size=micro, eval_sequences=4, sample_tokens=0
        ),
        offload=OffloadOptions(activations=ActivationOptions(**activations), **(offload or {})),
        logger=LoggerOptions(tensorboard=False, plot=False),
        run=RunOptions(root=str(root), name=name),
    )
    events: list[dict[str, Any]] = []
    Trainer(job, emit=events.append).train()
    losses = [event["loss"] for event in events if event["type"] == "step"]
    assert len(losses) == 6
    return losses, "\n".join(event["text"] for event in events if event["type"] in ("plan", "message", "end"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("".join(f"{number} squared is {number * number}.\n" for number in range(2000)))
    return file


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[float]:
    return run(tmp_path_factory.mktemp("kept"), "kept", data)[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "swap", "alpha": 1.0}, "2 swap 1 of the tokens to host memory"),
        ({"mode": "swap", "alpha": 0.0, "keep_last": 0}, "4 swap 0 of the tokens to host memory"),
        ({"mode": "input"}, "2 swap their input alone to host memory, all is recomputed; the last 2 keep all"),
        ({"mode": "recompute"}, "4 keep their input and attention's output"),
        ({"mode": "checkpoint"}, "4 keep their input, all is recomputed"),
    ],
)
def test_losses_are_bitwise_those_of_a_run_that_keeps_all(
    tmp_path: Path, data: Path, kept: list[float], options: dict[str, Any], told: str
) -> None:
    losses, text = run(tmp_path, "away", data, **options)
    assert losses == kept
    assert told in text


@pytest.mark.parametrize("weights", ["host", pytest.param("device", marks=pytest.mark.slow)])
def test_with_states_and_weights_in_host_memory_too(tmp_path: Path, data: Path, weights: str) -> None:
    tier = {"states": "host", "weights": weights, "update": "speculate", "speculate_share": 0.5}
    stay, _ = run(tmp_path, "stay", data, offload=tier)
    leave, _ = run(tmp_path, "leave", data, offload=tier, mode="swap", alpha=1.0, keep_last=1)
    assert leave == stay


@pytest.mark.parametrize(
    "states",
    [
        {},
        pytest.param({"states": "nvme", "weights": "host"}, marks=pytest.mark.slow),
        {"states": "nvme", "weights": "nvme"},
    ],
)
def test_what_goes_on_to_a_drive_is_told(
    tmp_path: Path, data: Path, kept: list[float], disk_folder: Path, states: dict[str, Any]
) -> None:
    """Alone, and beside states on the same drive: bitwise the run that keeps all."""
    stay = run(tmp_path, "stay", data, offload=states | {"nvme_path": [str(disk_folder)]})[0] if states else kept
    each = 2 * 32 * 4 * (64 + 64 + 4) // 4096 * 4096 + 4096
    drives = {**states, "nvme_path": [str(disk_folder)], "nvme_bytes": 2**24, "nvme_tbw": 600.0}
    swap = {"mode": "swap", "alpha": 0.0, "keep_last": 0, "host_bytes": 2 * each}
    losses, text = run(tmp_path, "away", data, offload=drives, **swap)
    assert losses == stay
    assert "host memory holds 2 of them" in text and "what the first 2 leave goes on to NVMe" in text
    assert "drives: writes" in text and "rated for 600 TB last" in text.splitlines()[-2]


@pytest.mark.slow
def test_a_model_of_hugging_face(tmp_path: Path, data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "hf")
    model = HFOptions(path=str(tmp_path / "hf"), from_scratch=True)
    stay, _ = run(tmp_path, "stay", data, model=model)
    for alpha in (0.0, 1.0):
        leave, _ = run(tmp_path, f"leave-{alpha:g}", data, model=model, mode="swap", alpha=alpha, keep_last=0)
        assert leave == stay


def test_mlps_run_by_tiles(tmp_path: Path, data: Path, kept: list[float]) -> None:
    losses, _ = run(tmp_path, "tiled", data, mode="swap", alpha=0.0, tile_tokens=24)
    assert losses == pytest.approx(kept, rel=1e-5)


def test_blocks_run_through_all_micro_batches_while_their_weights_are_there(
    tmp_path: Path, data: Path, kept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer-major: by tiles of a micro-batch's tokens, weights come from host memory as for one micro-batch."""
    came: list[int] = []
    gather = TrainableFlat.gather

    def counted(flat: TrainableFlat, out: torch.Tensor, scratch: Any) -> Any:
        came.append(out.numel())
        return gather(flat, out, scratch)

    monkeypatch.setattr(TrainableFlat, "gather", counted)
    streamed = {"states": "host", "weights": "host"}
    batch_major = run(tmp_path, "batch-major", data, micro=1, offload=streamed, mode="recompute")[0]
    for_four = sum(came)
    came.clear()
    layer_major = run(tmp_path, "layer-major", data, micro=None, offload=streamed, mode="stream", tile_tokens=32)[0]
    assert sum(came) < 0.4 * for_four, (came, for_four)
    assert batch_major == pytest.approx(kept, rel=1e-4) and layer_major == pytest.approx(kept, rel=1e-4)


@pytest.mark.parametrize("tier", [{}, AWAY])
@pytest.mark.parametrize("mode", ["stream", "stream_input"])
def test_whole_blocks_run_by_tiles(
    tmp_path: Path, data: Path, kept: list[float], mode: str, tier: dict[str, Any]
) -> None:
    """Of 12 tokens of each sequence, the last of 8."""
    losses, text = run(tmp_path, "stream", data, offload=tier, mode=mode, tile_tokens=24)
    assert losses == pytest.approx(kept, rel=1e-5)
    assert "4 run by tiles of 24 tokens" in text


@pytest.mark.parametrize("weights", ["host", "nvme"])
def test_tiles_go_on_to_a_drive(tmp_path: Path, data: Path, kept: list[float], disk_folder: Path, weights: str) -> None:
    """Beside states on it, and weights in host memory or there, too."""
    drives = {"states": "nvme", "weights": weights, "nvme_path": [str(disk_folder)]}
    losses, text = run(tmp_path, "nvme", data, offload=drives, mode="stream", tile_tokens=24, host_bytes=100_000)
    assert losses == pytest.approx(kept, rel=1e-5)
    assert "host memory holds 2 of them" in text and "goes on to NVMe" in text


def test_what_cannot_run_by_tiles_is_refused(tmp_path: Path) -> None:
    """Before anything is taken: a model that does not say how, and fp32 on a GPU."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path / "hf")
    offload = OffloadOptions(activations=ActivationOptions(mode="stream"))
    job = Job(model=HFOptions(path=str(tmp_path / "hf"), from_scratch=True), offload=offload)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    model = build_model(job.model, vocab_size=64, seq_len=32, dtype=torch.float32, device=cpu)
    with pytest.raises(ValueError, match="mode=stream: Qwen3DecoderLayer .* set offload.activations.mode=swap"):
        build_engine(job, model, Rank(0, 1, cpu), torch.float32)
    llama = build_model(MODEL, vocab_size=64, seq_len=32, dtype=torch.float32, device=cpu)
    with pytest.raises(ValueError, match="float32 on a GPU.*set train.dtype=bf16"):
        build_engine(Job(model=MODEL, offload=offload), llama, Rank(0, 1, gpu), torch.float32)


def test_a_run_chooses_alpha_and_says_so(tmp_path: Path, data: Path, kept: list[float]) -> None:
    losses, text = run(tmp_path, "auto", data, mode="auto", keep_last=1)
    assert losses == pytest.approx(kept, rel=1e-4)  # a product cut in two may round otherwise
    assert "activations: 3 blocks swap" in text and "1 block keep" in text


@pytest.mark.parametrize("tier", [pytest.param({}, marks=pytest.mark.slow), AWAY])
def test_compiled_blocks_are_not_compiled_again_for_another_length(tier: dict[str, str]) -> None:
    """Nor what they call: the hooks that pack what they save, for each unit whose weights are brought."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    where = Rank(0, 1, torch.device("cpu"))
    job = Job(
        model=MODEL,
        train=TrainOptions(seq_len=64, global_batch_size=2, micro_batch_size=2),
        offload=OffloadOptions(activations=ActivationOptions(mode="swap", alpha=0.25, keep_last=1), **tier),
    )
    model = build_model(job.model, vocab_size=64, seq_len=64, dtype=torch.float32, device=where.device)
    for block in model.blocks():
        block.forward = torch.compile(block.forward, backend="aot_eager")
    with (
        torch._dynamo.config.patch(assume_static_by_default=False),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        engine = build_engine(job, model, where, torch.float32)

        def step(num_tokens: int) -> float:
            rows = torch.randint(0, 64, (2, num_tokens + 1))
            loss = engine.forward_backward(rows[:, :-1], rows[:, 1:], scale=1.0, first=True, last=True)
            engine.step(1e-3, 1.0)
            return float(loss)

        step(64)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert all(math.isfinite(step(num_tokens)) for num_tokens in (48, 17, 64))
        engine.close()
