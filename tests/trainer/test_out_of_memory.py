"""A step that is out of memory says who holds it and what would take less."""

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.activations.memory import Pools
from offload.options import ActivationOptions, OffloadOptions
from parallel import sharded
from trainer.job import Job
from trainer.loop import Trainer
from trainer.models import llama
from trainer.options import DataOptions, HFOptions, LlamaOptions, LoggerOptions, RunOptions, TrainOptions

SMALL = LlamaOptions(dim=64, ffn_dim=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16)
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("".join(f"{number} squared is {number * number}.\n" for number in range(20000)))
    return file


def train(root: Path, data: Path, model: Any = SMALL, **options: Any) -> None:
    sizes = {"seq_len": 64, "global_batch_size": 4, **options.pop("train", {})}
    job = Job(
        model=model,
        data=DataOptions(source="text", paths=[str(data)], valid_fraction=0, cache_dir=str(root / "cache")),
        train=TrainOptions(steps=2, eval_sequences=0, sample_tokens=0, **sizes),
        offload=OffloadOptions(**{"activations": ActivationOptions(**options.pop("activations", {})), **options}),
        logger=LoggerOptions(tensorboard=False, plot=False),
        run=RunOptions(root=str(root), name="-".join(options) or "run"),
    )
    Trainer(job, emit=lambda _: None).train()


def full_once(real: Any) -> Any:
    """`real`, but the first call finds no memory."""
    calls: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError(SAID)
        return real(*args, **kwargs)

    return call


def test_owners_and_overrides_are_named(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "swiglu", full_once(llama.swiglu))  # where a block allocates
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(tmp_path, data)
    text = str(caught.value)
    assert text.startswith("out of memory on rank 0 in step 0: CUDA out of memory. Tried to allocate 2.00 GiB\n")
    owners = re.search("largest owners: (.*)", text)
    assert owners and owners[1].startswith("activations and workspace") and "optimizer states" in owners[1]
    lines = text.splitlines()[3:]
    assert lines, text
    for override in (
        "offload.activations=recompute ",
        "offload.activations=checkpoint ",
        "train.micro_batch_size=2 ",
        "offload.activations.tile_tokens=64 ",
        "offload.states=host ",
        "offload.states=host offload.weights=host ",
    ):
        assert any(line.strip().startswith(override) for line in lines), (override, text)
    estimate = re.search(r"by estimate this takes ([\d.]+) MiB", text)
    assert estimate
    taken = [float(re.search(r"([\d.]+) MiB", line)[1]) for line in lines]  # type: ignore[index]
    assert taken == sorted(taken, reverse=True) and taken[0] < float(estimate[1])


def test_in_the_backward_of_a_run_that_swaps(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pools, "take_buffer", full_once(Pools.take_buffer))
    with pytest.raises(torch.OutOfMemoryError, match="offload.activations=swap offload.activations.alpha=0 "):
        train(tmp_path, data, activations={"mode": "swap", "alpha": 1.0}, states="host")


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (
            "none",
            ["parameters ", "optimizer states ", "offload.states=host ", "offload.states=host offload.weights=host "],
        ),
        ("host", ["offload.weights=host "]),
    ],
)
def test_weights_and_states_that_do_not_fit(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, states: str, said: list[str]
) -> None:
    monkeypatch.setattr(sharded, "make_unit", full_once(sharded.make_unit))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(tmp_path, data, states=states, predict=states == "none")
    text = str(caught.value)
    assert text.startswith("out of memory on rank 0 before the first step: CUDA out of memory. Tried to allocate 2.00 ")
    for words in ("by count it takes ", *said):
        assert words in text, text
    taken = [float(size) for size in re.findall(r"^(?:by count it takes|  .*=host ) *([\d.]+) MiB", text, re.MULTILINE)]
    assert len(taken) > 1 and taken == sorted(taken, reverse=True)


def test_overrides_may_be_added_to_those_of_the_run(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An α that was given is of no other mode, and tiles may be smaller."""
    monkeypatch.setattr(Pools, "take_buffer", full_once(Pools.take_buffer))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(tmp_path, data, activations={"mode": "swap", "alpha": 1.0, "tile_tokens": 128})
    told = re.findall(r"^  (offload\.activations.*?)  ", str(caught.value), re.MULTILINE)
    assert "offload.activations.tile_tokens=64" in told
    for text in told:
        given = {"mode": "swap", "alpha": "1.0", "tile_tokens": "128"}
        for override in text.split():
            name, value = override.removeprefix("offload.activations").split("=")
            given[name.removeprefix(".") or "mode"] = value
        ActivationOptions(
            mode=given["mode"], alpha=None if given["alpha"] == "null" else float(given["alpha"]),
            tile_tokens=int(given["tile_tokens"]),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_models_without_plain_mlps_have_their_overrides(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    transformers = pytest.importorskip("transformers")
    module = getattr(transformers.models, kind)
    if kind == "gpt2":
        config, mlp = transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4), "GPT2MLP"
    else:
        config = transformers.MixtralConfig(
            vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        )  # fmt: skip
        mlp = "MixtralSparseMoeBlock"
    config.save_pretrained(tmp_path / "hf")
    mlp = getattr(getattr(module, f"modeling_{kind}"), mlp)
    monkeypatch.setattr(mlp, "forward", full_once(mlp.forward))
    with pytest.raises(torch.OutOfMemoryError, match="offload.activations=recompute "):
        train(tmp_path, data, HFOptions(path=str(tmp_path / "hf"), from_scratch=True), train={"dtype": "bf16"})


def test_a_model_that_cannot_be_estimated_still_has_its_owners_told(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.out_of_memory.footprint", lambda *_, **__: 1 // 0)
    monkeypatch.setattr(llama, "swiglu", full_once(llama.swiglu))
    with pytest.raises(torch.OutOfMemoryError, match="largest owners: optimizer states"):
        train(tmp_path, data)


def said(root: Path, data: Path, model: LlamaOptions, **options: Any) -> str:
    """Of a run that is out of memory."""
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(root, data, model, **options)
    return str(caught.value)


@pytest.mark.gpu
def test_what_is_said_to_fit_does(tmp_path: Path, data: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    model = LlamaOptions(dim=1024, ffn_dim=4096, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=64)
    sizes = {"seq_len": 4096, "global_batch_size": 4, "dtype": "bf16"}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(10 * 2**30 / total)
    try:
        text = said(tmp_path / "keep", data, model, train=sizes)
        line = re.search("offload.activations=recompute .*", text)
        assert line and line[0].endswith(", fits"), text
        gc.collect()  # the error's frames hold the engine
        torch.cuda.empty_cache()
        train(tmp_path / "recompute", data, model, train=sizes, activations={"mode": "recompute"})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
