"""What the driver can know before anything starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint.options import CheckpointOptions
from launch.checks import Crew, Machine, check, find_crew
from launch.config import Config
from launch.options import LaunchOptions
from launch.plan import plan
from offload.options import ActivationOptions, OffloadOptions
from parallel.options import OptimizerOptions, ParallelOptions
from parallel.planning.machine import load_machine
from trainer.options import DataOptions, HFOptions, LlamaOptions, RunOptions, TrainOptions

CPU = Machine("a", 8, 0)
GPU = Machine("b", 8, 4)


@pytest.mark.parametrize(
    ("options", "machines", "crew"),
    [
        (LaunchOptions(), [CPU], Crew(2, 1, "cpu")),
        (LaunchOptions(), [GPU], Crew(4, 1, "cuda")),
        (LaunchOptions(device="cpu"), [GPU], Crew(2, 1, "cpu")),
        (LaunchOptions(workers=1), [GPU], Crew(1, 1, "cuda")),
        (LaunchOptions(workers=64), [CPU], Crew(64, 1, "cpu")),
        (LaunchOptions(nodes=2, address="a:1"), [GPU, CPU, GPU], Crew(8, 2, "cuda")),
        (LaunchOptions(nodes=3, address="a:1"), [CPU, CPU, CPU], Crew(3, 3, "cpu")),
    ],
)
def test_workers_that_were_not_counted(options: LaunchOptions, machines: list[Machine], crew: Crew) -> None:
    assert find_crew(options, machines) == crew


@pytest.mark.parametrize(
    ("options", "machines", "words"),
    [
        (LaunchOptions(workers=8), [GPU], "needs 8 GPUs on one node.*b with 8 CPUs and 4 GPUs"),
        (LaunchOptions(workers=10, nodes=2, address="a:1"), [GPU, GPU], "needs 5 GPUs on each of 2 nodes"),
        (LaunchOptions(nodes=3, address="a:1"), [GPU, GPU], "launch.nodes=3.*2 nodes"),
        (LaunchOptions(device="cuda", address="a:1"), [CPU], "launch.device=cuda.*0 GPUs"),
        (LaunchOptions(workers=20, address="a:1"), [CPU], "needs 20 CPUs"),
    ],
)
def test_more_than_there_is(options: LaunchOptions, machines: list[Machine], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_crew(options, machines)


@pytest.mark.parametrize(
    ("crew", "levels"),
    [
        (Crew(4, 1, "cpu"), {"worker": 4}),
        (Crew(4, 1, "cuda"), {"gpu": 4}),
        (Crew(4, 2, "cuda"), {"node": 2, "gpu": 2}),
    ],
)
def test_levels_come_from_the_placement(crew: Crew, levels: dict[str, int], tmp_path: Path) -> None:
    config = check(Config(run=RunOptions(root=str(tmp_path))), crew)
    assert config.parallel.levels == levels and list(config.parallel.levels) == list(levels)


def test_levels_that_were_given_stay(tmp_path: Path) -> None:
    levels = {"node": 2, "gpu": 2}
    config = Config(run=RunOptions(root=str(tmp_path)), parallel=ParallelOptions(levels=levels))
    assert check(config, Crew(4, 1, "cpu")).parallel.levels == levels
    with pytest.raises(ValueError, match="node 2 x gpu 2.*launch.workers=8"):
        check(config, Crew(8, 1, "cpu"))


def test_levels_of_a_named_machine(tmp_path: Path) -> None:
    config = Config(run=RunOptions(root=str(tmp_path)), machine="frontier", parallel=ParallelOptions(placement="topo"))
    assert check(config, Crew(16, 2, "cpu")).parallel.levels == {"node": 2, "gpu": 4, "die": 2}
    with pytest.raises(ValueError, match="machine=frontiere.*did you mean frontier"):
        check(replace(config, machine="frontiere"), Crew(16, 2, "cpu"))


def test_quantization_of_a_level_that_is_not_there_or_by_another_engine(tmp_path: Path) -> None:
    config = Config(run=RunOptions(root=str(tmp_path)), parallel=ParallelOptions(grads_format={"node": "int4"}))
    with pytest.raises(ValueError, match="parallel.grads_format names node; the levels are worker"):
        check(config, Crew(2, 1, "cpu"))
    quantized = ParallelOptions(placement="zero3", quantize="all")
    with pytest.raises(ValueError, match="need engine=native; engine=fsdp2 does not read"):
        check(replace(config, parallel=quantized, engine="fsdp2"), Crew(2, 1, "cpu"))


def test_p_not_inside_g_and_more_levels_than_there_are(tmp_path: Path) -> None:
    def checked(*triple: int) -> None:
        parallel = ParallelOptions(placement="free", **dict(zip(("params", "grads", "optim"), triple, strict=True)))
        check(Config(run=RunOptions(root=str(tmp_path)), parallel=parallel), Crew(4, 2, "cpu"))

    with pytest.raises(ValueError, match=r"parallel.params=2 <= parallel.grads=1 <= parallel.optim=2 must be"):
        checked(2, 1, 2)
    with pytest.raises(ValueError, match=r"parallel.optim=3 is more than the number of parallel.levels, which is 2"):
        checked(0, 1, 3)
    checked(0, 1, 2)


def test_a_block_larger_than_a_shard(tmp_path: Path) -> None:
    model = LlamaOptions(dim=32, num_heads=2, ffn_dim=64, num_layers=1)
    parallel = ParallelOptions(placement="zero3", quantize="all", grads_block=4096)
    config = Config(run=RunOptions(root=str(tmp_path)), model=model, parallel=parallel)
    with pytest.raises(ValueError, match=r"parallel.grads_block=4096 is larger than a shard: .* each of 8 ranks has"):
        check(config, Crew(8, 1, "cpu"))
    check(config, Crew(1, 1, "cpu"))  # nothing crosses
    tried = ParallelOptions(candidates=["zero3", "zero3+all"], auto_steps=1, grads_block=4096)
    with pytest.raises(ValueError, match=r"parallel.grads_block=4096 is larger than a shard"):
        check(replace(config, parallel=tried), Crew(8, 1, "cpu"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exact": ["head.*"]}, r"parallel.exact=\['head.\*'\] is only read where something is quantized"),
        ({"weights_block": 64}, "parallel.weights_block=64 is only read where something is quantized"),
        ({"grads_block": 64}, "parallel.grads_block=64 is only read where something is quantized"),
        ({"quantize": "all", "exact": ["haed.*"]}, r"parallel.exact has 'haed.\*', which no parameter is called"),
        ({"quantize": "all", "exact": ["*"]}, r"parallel.exact=\['\*'\] leaves nothing to quantize"),
        ({"weights_format": {"worker": "int8"}, "error_feedback": True}, "these are exact on every level"),
    ],
)
def test_quantization_that_would_change_nothing(options: dict, words: str, tmp_path: Path) -> None:
    config = Config(run=RunOptions(root=str(tmp_path)), parallel=ParallelOptions(placement="zero3", **options))
    with pytest.raises(ValueError, match=words):
        check(config, Crew(2, 1, "cpu"))


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = replace(Config(), run=RunOptions(root=str(tmp_path / "file")))
    with pytest.raises(ValueError, match=r"run\.root="):
        check(config, Crew(2, 1, "cpu"))


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        (LlamaOptions(num_heads=4, num_kv_heads=2), {}, "has 3 ranks, which model.num_heads=4 must be divisible by"),
        (LlamaOptions(num_heads=6, num_kv_heads=2), {"seq_len": 2}, "each needs a token of train.seq_len=2"),
    ],
)
def test_sequences_that_cannot_be_shared(model: LlamaOptions, train: dict, message: str, tmp_path: Path) -> None:
    parallel = ParallelOptions(levels={"node": 2, "gpu": 3}, sequence="gpu")
    config = Config(model=model, train=TrainOptions(**train), run=RunOptions(root=str(tmp_path)), parallel=parallel)
    with pytest.raises(ValueError, match=message):
        check(config, Crew(6, 2, "cpu"))


@pytest.mark.filterwarnings("ignore:.*no fused attention")
@pytest.mark.parametrize(
    ("kind", "message"),
    [("bloom", "as its attention is its own"), ("mamba", "as its tokens meet in more than attention")],
)
def test_sequences_of_a_model_that_ranks_cannot_share(kind: str, message: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2}
    transformers.AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path / "hf")
    config = Config(
        model=HFOptions(path=str(tmp_path / "hf"), from_scratch=True),
        parallel=ParallelOptions(sequence="worker"),
        run=RunOptions(root=str(tmp_path)),
    )
    check(config, Crew(1, 1, "cpu"))
    with pytest.raises(ValueError, match=f"Model cannot share sequences over ranks, {message}"):
        check(config, Crew(2, 1, "cpu"))


@pytest.mark.parametrize(
    ("tiles", "message"),
    [({"mode": "stream"}, "GPT2Block does not say how it runs by tiles"), ({"tile_tokens": 64}, "no MLP of plain")],
)
def test_tiles_of_a_model_that_has_none(tiles: dict[str, Any], message: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4).save_pretrained(tmp_path / "hf")
    config = Config(
        model=HFOptions(path=str(tmp_path / "hf"), from_scratch=True),
        offload=OffloadOptions(activations=ActivationOptions(**tiles)),
        run=RunOptions(root=str(tmp_path)),
        launch=LaunchOptions(workers=1),
    )
    with pytest.raises(ValueError, match=message):
        check(config, Crew(1, 1, "cpu"))
    with pytest.raises(ValueError, match=message):
        plan(config, load_machine("single"))


def test_tiles_in_32_bits_on_a_gpu(tmp_path: Path) -> None:
    config = Config(
        offload=OffloadOptions(activations=ActivationOptions(mode="stream")),
        run=RunOptions(root=str(tmp_path)),
        train=TrainOptions(dtype="fp32"),
    )
    check(config, Crew(1, 1, "cpu"))
    with pytest.raises(ValueError, match="set train.dtype=bf16"):
        check(config, Crew(1, 1, "cuda"))


def test_tiles_of_blocks_share_sequences(tmp_path: Path) -> None:
    config = Config(
        offload=OffloadOptions(activations=ActivationOptions(mode="stream")),
        parallel=ParallelOptions(levels={"node": 1, "gpu": 2}, sequence="gpu"),
        run=RunOptions(root=str(tmp_path)),
    )
    assert check(config, Crew(2, 1, "cpu")).parallel.sequence_ranks == 2


def test_tiles_need_our_engine(tmp_path: Path) -> None:
    offload = OffloadOptions(activations=ActivationOptions(tile_tokens=64))
    config = Config(engine="fsdp2", offload=offload, run=RunOptions(root=str(tmp_path)))
    with pytest.raises(ValueError, match="offload.activations.tile_tokens=64 needs engine=native"):
        check(config, Crew(2, 1, "cpu"))


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        *((LlamaOptions, key, 0) for key in ("dim", "ffn_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")),
        *((LlamaOptions, key, 0) for key in ("vocab_size", "rope_theta", "norm_eps", "init_std")),
        (OptimizerOptions, "eps", 0.0),
        (OptimizerOptions, "momentum", 1.0),
        (OptimizerOptions, "weight_decay", -0.1),
        (TrainOptions, "seed", 1 << 62),
        *((RunOptions, "name", name) for name in (".", "../up", "/elsewhere", "a//b")),
    ],
)
def test_values_that_cannot_be(options: type, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"\.{key}="):
        options(**{key: value})


def test_no_number_and_infinity() -> None:
    for broken in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="optimizer.lr=.*finite"):
            Config(optimizer=OptimizerOptions(lr=broken))
        with pytest.raises(ValueError, match="launch.notice_s=.*finite"):
            Config(launch=LaunchOptions(notice_s=broken))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": DataOptions(source="text", paths=["nothing/*.txt"])}, "data.paths=nothing"),
        ({"data": DataOptions(valid_paths=["nothing"])}, "data.valid_paths=nothing"),
        ({"data": DataOptions(tokenizer="nothing/tokenizer.json")}, "data.tokenizer=nothing"),
        ({"model": HFOptions(path="nothing")}, "model.path='nothing'"),
        ({"offload": OffloadOptions(states="nvme", nvme_path=["nothing"])}, "offload.nvme_path=nothing"),
        ({"checkpoint": CheckpointOptions(url="foo://bar")}, "checkpoint.url='foo://bar'"),
        ({"checkpoint": CheckpointOptions(url="/proc/nowhere")}, "checkpoint.url=/proc/nowhere"),
        (
            {"offload": OffloadOptions(states="nvme", nvme_path=["/proc"])},
            "^offload.nvme_path=/proc: no file can be written there: .*; .* set offload.nvme_path",
        ),
    ],
)
def test_files_that_are_not_there(change: dict, words: str, tmp_path: Path) -> None:
    config = replace(Config(run=RunOptions(root=str(tmp_path))), **change)
    with pytest.raises(ValueError, match=words):
        check(config, Crew(2, 1, "cpu"))
    elsewhere = replace(config, launch=LaunchOptions(address="a:1"))
    check(elsewhere, Crew(2, 1, "cpu"))  # other machines may have them


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offload": OffloadOptions(gpu_bytes=1)}, "offload.gpu_bytes=1 is not read with offload.states=none"),
        ({"offload": OffloadOptions(states="host", nvme_bytes=1)}, "offload.nvme_bytes=1 is not read"),
        ({"offload": OffloadOptions(threads=2)}, "offload.threads=2 is not read with offload.states=none"),
        (
            {"offload": OffloadOptions(states="host", speculate_share=0.5)},
            "offload.speculate_share=0.5 is only read with offload.update=speculate",
        ),
        (
            {"offload": OffloadOptions(states="nvme", nvme_path=["/"], update="speculate")},
            "offload.update=speculate with offload.states=nvme .* set it, or leave offload.update out",
        ),
        ({"checkpoint": CheckpointOptions(parity=1)}, "checkpoint.snapshot_every_steps=0"),
        ({"checkpoint": CheckpointOptions(parity=1, snapshot_every_steps="1")}, "checkpoint.parity=1 over one node"),
        (
            {"offload": OffloadOptions(states="host"), "optimizer": OptimizerOptions(name="sgd")},
            "offload.states=host updates by AdamW",
        ),
        ({"optimizer": OptimizerOptions(momentum=0.5)}, "optimizer.momentum=0.5 is only read with optimizer=sgd"),
        ({"optimizer": OptimizerOptions(name="sgd", beta2=0.5)}, "optimizer.beta2=0.5 .* optimizer=adamw"),
        ({"optimizer": OptimizerOptions(schedule="constant", final_lr_ratio=0.5)}, "optimizer.final_lr_ratio=0.5 is"),
        ({"data": DataOptions(column="body")}, "data.column=body is only read with data.source=jsonl"),
        ({"data": DataOptions(valid_paths=[__file__], valid_fraction=0.5)}, "data.valid_fraction=0.5 is only read"),
        ({"train": TrainOptions(rewinds=9)}, "train.rewinds=9 is only read with train.on_bad_numbers=rewind"),
        ({"offload": OffloadOptions(predict=False)}, "offload.predict=False is only read with other offload.states"),
        (
            {"offload": OffloadOptions(activations=ActivationOptions(mode="recompute", host_bytes=9))},
            "offload.activations.host_bytes=9 is only read with offload.activations.mode=swap",
        ),
        ({"checkpoint": CheckpointOptions(snapshot_hold_s=3)}, "checkpoint.snapshot_hold_s=3 is only read with"),
    ],
)
def test_what_would_be_ignored_or_refused_by_the_ranks(change: dict, words: str, tmp_path: Path) -> None:
    config = replace(Config(run=RunOptions(root=str(tmp_path))), **change)
    with pytest.raises(ValueError, match=words):
        check(config, Crew(2, 1, "cpu"))


def test_threads_are_read_where_activations_leave(tmp_path: Path) -> None:
    run, swap = RunOptions(root=str(tmp_path)), ActivationOptions(mode="swap")
    assert check(Config(run=run, offload=OffloadOptions(threads=2, activations=swap)), Crew(2, 1, "cpu"))


@pytest.mark.parametrize("states", ["none", "host"])
def test_drives_are_read_where_activations_go_on_to_them(states: str, tmp_path: Path) -> None:
    drives = {"nvme_path": [str(tmp_path)], "nvme_bytes": 1, "nvme_tbw": 600.0, "nvme_direct": False}
    run = RunOptions(root=str(tmp_path))
    for mode in ("swap", "recompute"):
        config = Config(
            run=run, offload=OffloadOptions(states=states, activations=ActivationOptions(mode=mode), **drives)
        )
        if mode == "swap":
            assert check(config, Crew(2, 1, "cpu")).offload.nvme_bytes == 1
        else:
            with pytest.raises(ValueError, match="offload.nvme_path=.* or offload.activations that swap"):
                check(config, Crew(2, 1, "cpu"))


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"placement": "zero3"}, False),
        ({"placement": "hsdp"}, False),
        ({"placement": "ddp"}, False),
        ({"placement": "zero3", "grads_format": {"node": "int4"}}, False),
        ({"placement": "hsdp", "quantize": "outer"}, False),
        ({"placement": "topo"}, True),
        ({"placement": "zero2"}, True),
        ({"placement": "zero3", "quantize": "outer"}, True),
        ({"placement": "zero3", "auto_steps": 2, "candidates": ["zero3", "hfsdp"]}, True),
    ],
)
def test_weights_on_drives_need_their_states_beside_them(options: dict, refused: bool, tmp_path: Path) -> None:
    offload = OffloadOptions(states="nvme", weights="nvme", nvme_path=[str(tmp_path)], nvme_direct=False)
    config = Config(offload=offload, parallel=ParallelOptions(**options), run=RunOptions(root=str(tmp_path)))
    if refused:
        with pytest.raises(ValueError, match="offload.weights=nvme: .*parallel=zero3, hsdp or ddp"):
            check(config, Crew(4, 2, "cpu"))
    else:
        check(config, Crew(4, 2, "cpu"))


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_another_engine_with_what_it_has(engine: str, tmp_path: Path) -> None:
    config = Config(engine=engine, run=RunOptions(root=str(tmp_path)))
    assert check(config, Crew(2, 1, "cpu")).engine == engine


def test_overlap_of_an_engine_that_has_its_own(tmp_path: Path) -> None:
    config = Config(engine="fsdp2", parallel=ParallelOptions(overlap=False), run=RunOptions(root=str(tmp_path)))
    with pytest.raises(ValueError, match="parallel.overlap=False needs engine=native"):
        check(config, Crew(2, 1, "cpu"))


def test_levels_that_an_engine_does_not_read(tmp_path: Path) -> None:
    config = Config(
        engine="deepspeed", parallel=ParallelOptions(levels={"node": 2}), run=RunOptions(root=str(tmp_path))
    )
    with pytest.raises(ValueError, match="parallel.levels is not read by engine=deepspeed"):
        check(config, Crew(2, 1, "cpu"))
