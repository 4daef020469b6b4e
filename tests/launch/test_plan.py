"""The text of ``atoll plan``, from a composed config, without a GPU and without Ray."""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from launch.checks import Crew, check
from launch.config import Config, register, to_config
from launch.plan import Planned, named_machine, plan, settle, show
from parallel.planning.cost import KINDS
from parallel.planning.machine import PRESETS, Machine


def composed(*overrides: str) -> Config:
    register()
    with initialize_config_module("conf", version_base="1.3"):
        return to_config(compose("config", overrides=list(overrides)))


BIG = ("model=70b", "launch.workers=512", "train.seq_len=4096", "train.global_batch_size=1024",
       "train.micro_batch_size=1", "offload=recompute")  # fmt: skip


def test_a_table_of_memory_and_levels() -> None:
    text = show(plan(composed(*BIG, "parallel=hfsdp"), PRESETS["dgx-h100"]))
    assert all(kind in text for kind in KINDS)
    for said in (
        "512 ranks: node 64 x gpu 8",
        "hfsdp: P over gpu",
        "bottleneck",
        "tokens/s",
        "GiB too much",
        "transport  exact",
    ):
        assert said in text, text


@pytest.mark.timed
def test_auto_says_why_and_is_quick() -> None:
    start = time.perf_counter()
    planned = plan(composed(*BIG, "parallel=auto"), PRESETS["dgx-h100"])
    took = time.perf_counter() - start
    assert "limited by" in show(planned) and planned.candidate.cost.memory_bytes <= planned.cap_bytes
    assert took < 8, took


def test_auto_may_quantize_where_it_is_told_so() -> None:
    planned = plan(
        composed(*BIG, "parallel=auto", "parallel.quantize=auto", "parallel.memory_gib=80"), PRESETS["ethernet-25g"]
    )
    assert planned.candidate.quantize in ("outer", "all")
    assert "weights int8/256 over node" in show(planned)


SMALL = ("launch.workers=256", "train.global_batch_size=256", "model.dim=32", "model.ffn_dim=64", "model.num_heads=2",
         "model.num_kv_heads=1", "model.head_dim=16")  # fmt: skip


@pytest.mark.parametrize("placement", ["zero3", "auto"])
def test_a_block_larger_than_a_shard_is_refused(placement: str) -> None:
    with pytest.raises(ValueError, match=r"parallel\.weights_block=256 is larger than a shard"):
        plan(composed(*SMALL, f"parallel={placement}", "parallel.quantize=all"), PRESETS["ethernet-25g"])


def test_auto_takes_no_block_that_the_engine_would_refuse(tmp_path: Path) -> None:
    asked = ("parallel=auto", "parallel.quantize=auto", "machine=ethernet-25g", f"run.root={tmp_path}")
    config, _ = settle(composed(*SMALL, *asked), 256)
    assert config.parallel.quantize == "none" and not any("+" in name for name in config.parallel.candidates)
    check(config, Crew(256, 32, "cpu"))


def test_nothing_fits_is_one_error() -> None:
    with pytest.raises(ValueError, match="nothing fits"):
        plan(composed(*BIG, "offload=none", "parallel=auto", "parallel.memory_gib=4"), PRESETS["ethernet-25g"])


def test_the_default_job_on_one_gpu() -> None:
    text = show(plan(composed("launch.workers=1"), PRESETS["single"]))
    assert "1 rank: " in text and "1 micro-batch of" in text and "bottleneck compute" in text


def test_a_config_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_size"):
        plan(composed("launch.workers=512"), PRESETS["dgx-h100"])


def test_ray_is_not_imported() -> None:
    import subprocess

    code = "import sys, launch.plan; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_train_gets_a_placement_in_the_place_of_auto() -> None:
    config, why = settle(composed(*BIG, "parallel=auto", "machine=dgx-h100"), 512)
    assert config.parallel.placement in ("zero3", "hfsdp", "topo", "free") and config.parallel.quantize == "none"
    assert config.parallel.levels == {"node": 64, "gpu": 8}
    assert f"parallel={config.parallel.placement}" in why
    assert plan(config, named_machine(config)).choice is None


def test_what_the_model_cannot_tell_apart_is_to_be_tried() -> None:
    asked = ("parallel=auto", "parallel.quantize=auto", "machine=ethernet-25g", "launch.workers=16")
    tried, why = settle(composed(*asked), 16)
    contenders = plan(composed(*asked), named_machine(tried)).choice.contenders
    assert 1 < len(tried.parallel.candidates) <= 4 and tried.parallel.auto_steps == 5
    assert tried.parallel.candidates == [one.name for one in contenders][:4] and tried.parallel.candidates[0] in why
    assert all(one.step_s <= 1.15 * contenders[0].step_s for one in contenders)
    alone, _ = settle(composed(*asked, "parallel.auto_steps=0"), 16)
    assert not alone.parallel.candidates and alone.parallel.placement == tried.parallel.placement


def test_a_machine_must_be_named_for_several_workers() -> None:
    with pytest.raises(ValueError, match="machine= is empty.*dgx-h100"):
        settle(composed("parallel=auto"), 4)
    config, _ = settle(composed("parallel=auto"), 1)
    assert config.parallel.placement == "ddp"


def test_what_only_auto_reads_is_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match="parallel.memory_gib are only read with parallel.placement=auto"):
        composed("parallel.memory_gib=4")
    with pytest.raises(ValueError, match="with parallel.placement=auto set parallel.quantize=auto"):
        composed("parallel=auto", "parallel.grads_format={node: int4}")


AWAY = ("model=3b", "model.vocab_size=32000", "launch.workers=1", "train.seq_len=4096", "train.global_batch_size=4",
        "offload.activations.mode=checkpoint")  # fmt: skip


def test_states_away_are_planned_as_they_were_measured() -> None:
    """3b, 4 x 4096 on one H200: 22.2 GiB of GPU memory, 14.0 host bytes a parameter (results/offload.json). Blocks were
    compiled, which the plan does not know: it says up to a tenth more."""
    streamed = ("offload=host", "offload.weights=host", f"offload.gpu_bytes={15 * 2**30}", "offload.update=speculate")
    planned = plan(composed(*AWAY, *streamed), PRESETS["single"])
    assert planned.away is not None and "does NOT fit" not in show(planned)
    assert 22.2 < planned.away.device_bytes / 2**30 < 1.1 * 22.2
    assert planned.away.prediction.host_bytes / 3015355392 == pytest.approx(14.0, rel=0.01)
    assert planned.away.step_s == pytest.approx(0.818, rel=0.1)
    text = show(planned)
    for said in ("GB to the device", "bottleneck host memory", "where the update is clipped", "host"):
        assert said in text, text


def test_auto_and_endurance_are_planned() -> None:
    auto = ("offload=auto", "offload.nvme_path=[/drive]", "offload.host_bytes=10_000_000_000", "offload.nvme_tbw=600",
            f"offload.device_bytes={24 * 2**30}")  # fmt: skip
    text = show(plan(composed(*AWAY, *auto), PRESETS["single"]))
    for said in (
        "chosen     offload.states=nvme",
        "TB a day; drives rated for 600 TB last",
        "read and as much written",
    ):
        assert said in text, text
    drives = ("model=8b", "offload=nvme", "offload.nvme_path=[/drive]", "launch.workers=16")
    shared = plan(composed(*drives, "train.global_batch_size=16"), PRESETS["dgx-h100"])
    assert shared.away is not None
    written_tb = 86400 * 8 * shared.written_bytes / shared.away.step_s / 1e12
    assert f"endurance  each node, of 8 ranks, writes {written_tb:.2f} TB a day" in show(shared)
    with pytest.raises(ValueError, match="offload.states=auto: nothing fits"):
        plan(
            composed(*AWAY, "offload=auto", "offload.host_bytes=1000", f"offload.device_bytes={2**34}"),
            PRESETS["single"],
        )


def test_weights_on_drives_are_planned() -> None:
    """3b with all on the drives: 34 bytes a parameter move in a step, of host memory a buffer's worth is taken."""
    drives = ("offload=nvme", "offload.weights=nvme", "offload.nvme_path=[/drive]", "offload.nvme_tbw=600")
    planned = plan(composed(*AWAY, *drives), PRESETS["single"])
    assert planned.away is not None
    held, numel = planned.away.prediction, 3015355392
    assert held.nvme_bytes / numel == pytest.approx(14, rel=1e-3)
    assert held.written_bytes / numel == pytest.approx(16, rel=1e-3)
    assert held.host_bytes / numel < 0.4
    assert planned.away.step_s == pytest.approx((held.read_bytes + held.written_bytes) / 2.3e9, rel=0.02)
    text = show(planned)
    for said in ("GB read and 48.25 written", "bottleneck the drives", "drives rated for 600 TB last"):
        assert said in text, text
    apart = ("launch.workers=16", "machine=dgx-h100", "parallel=topo", "train.global_batch_size=64")
    with pytest.raises(ValueError, match="offload.weights=nvme: .*parallel=zero3, hsdp or ddp"):
        plan(composed(*AWAY, *drives, *apart), PRESETS["dgx-h100"])


def test_what_is_away_and_does_not_fit_is_said() -> None:
    planned = plan(composed(*AWAY, "model=70b", "offload=host"), PRESETS["single"])
    assert planned.away is not None and "does NOT fit" in show(planned)


def activation_rows(planned: Planned) -> list[str]:
    assert planned.activations is not None
    return planned.activations.rows(planned.machine.tier)


def test_activation_tiers_and_the_alpha_that_would_be_chosen() -> None:
    config = composed("experiment=longcontext", "train.seq_len=32768")
    text = "\n".join(activation_rows(plan(config, PRESETS["dgx-h100"])))
    marked = [line for line in text.splitlines() if line.startswith("*")]
    assert len(marked) == 1 and "offload.activations=auto (α = " in marked[0]
    assert "GB leave at 50 GB/s" in text and "offload.activations=checkpoint" in text


LONG = ("experiment=longcontext", "model=1b", "train.seq_len=131072")


def roomy(name: str) -> Machine:
    """With memory for whatever host memory asks of the device."""
    return replace(PRESETS[name], memory={"gpu": 2e11, "host": 256e9})


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ((80, 200), r"α = [\d.]+"),
        ((18.5, 200), "input"),
        ((17, 200), "stream"),
        ((17, 10), "stream_input"),
    ],
)
def test_auto_is_planned_by_tiles_where_nothing_else_fits(asked: tuple[float, float], chosen: str) -> None:
    """1b, 131,072 tokens, by GB of the device and of host memory: it takes 15 GiB at the least, inputs alone 14."""
    device, host = (int(1e9 * size) for size in asked)
    limits = f"offload.device_bytes={device}", f"offload.activations.host_bytes={host}"
    planned = plan(composed(*LONG, *limits), PRESETS["single"])
    assert planned.activations is not None
    marked, why = activation_rows(planned)[-2:]
    assert re.match(rf"\* offload.activations=auto \({chosen}\) ", marked), marked
    tiled = chosen.startswith("stream")
    assert planned.activations.settled.streams == tiled == ("tiles of 32768 tokens" in why)
    assert planned.away is not None and "does NOT fit" not in show(planned)


def test_auto_says_why_it_does_not_run_by_tiles() -> None:
    planned = plan(composed(*LONG, "offload.device_bytes=17000000000", "train.dtype=fp32"), PRESETS["single"])
    assert (
        "cannot run by tiles: " in activation_rows(planned)[-1] and "train.dtype=bf16" in activation_rows(planned)[-1]
    )


def test_a_chosen_alpha_follows_the_machine() -> None:
    config = composed("experiment=longcontext", "train.seq_len=32768", "offload.activations.tile_tokens=null")
    rate, alphas = PRESETS["dgx-h100"], []
    for compute in (rate.compute, 2 * rate.compute, 100 * rate.compute):
        planned = plan(config, replace(rate, compute=compute))
        assert planned.activations is not None
        alphas.append(planned.activations.auto.alpha)
    assert 1 > alphas[0] > alphas[1] > alphas[2] == 0


def test_blocks_keep_what_the_device_has_left_over() -> None:
    """As a run does that finds it left over: all of them, some, or those that were asked for."""
    modes, kept = [], []
    for device_bytes in (80 * 10**9, 48 * 10**9, 16 * 10**9):
        limit = f"offload.device_bytes={device_bytes}"
        planned = plan(composed("experiment=longcontext", "model=1b", "train.seq_len=32768", limit), PRESETS["single"])
        assert planned.activations is not None and planned.away is not None
        assert planned.away.device_bytes < device_bytes
        modes.append(planned.activations.settled.mode)
        kept.append(planned.activations.settled.keep_last)
    assert modes == ["keep", "swap", "swap"] and kept[0] == 16 > kept[1] > kept[2] == 1
    asked = ("experiment=longcontext", "model=1b", "train.seq_len=32768", limit, "train.deterministic=true")
    same = plan(composed(*asked), PRESETS["single"])
    assert same.activations is not None and same.activations.settled.alpha in (0, 1)


@pytest.mark.parametrize(
    "mode",
    ["keep", "swap", "swap offload.activations.alpha=1", "swap offload.activations.alpha=0.5", "input", "recompute",
     "checkpoint", "auto", "stream", "stream_input"],
)  # fmt: skip
def test_the_table_of_memory_has_what_the_row_of_the_job_says(mode: str) -> None:
    planned = plan(composed(*BIG, "parallel=hfsdp", *f"offload.activations.mode={mode}".split()), PRESETS["dgx-h100"])
    row = re.search(r"^\* .* ([\d.]+) +[\d.]+$", "\n".join(activation_rows(planned)), re.MULTILINE)
    table = re.search(r"^  activations +([\d.]+)$", show(planned), re.MULTILINE)
    assert row and table and row[1] == table[1]
    assert planned.candidate.cost.memory["activations"] == pytest.approx(float(row[1]) * 2**30, abs=2**20)


SHARED = ("model=1b", "parallel=zero3", "train.seq_len=65537", "train.global_batch_size=3", "train.micro_batch_size=1",
          "train.dtype=bf16", "launch.workers=8", "parallel.sequence=gpu")  # fmt: skip


def test_a_sequence_that_ranks_share_counts_once() -> None:
    """One group of 8 has three sequences: each rank computes an eighth of what one alone does, and they are as many
    tokens."""
    modes = ("offload.activations.mode=recompute",)
    shared = plan(composed(*SHARED, *modes), PRESETS["dgx-h100"])
    alone = plan(composed(*SHARED, *modes, "launch.workers=1", "parallel.sequence=''"), PRESETS["single"])
    assert (shared.work.tokens, shared.work.micro_batches) == (8193, 3), "the first rank has a token more"
    assert (alone.work.tokens, alone.work.micro_batches) == (65537, 3)

    def flops(planned: Planned) -> float:
        work = planned.work
        return work.tokens * sum(u.forward_flops * (1 + u.recompute) + u.backward_flops for u in work.row)

    assert flops(shared) == pytest.approx(flops(alone) / 8, rel=2e-4)
    text = show(shared)
    in_all = float(re.search(r"([\d,]+) tokens/s in all", text)[1].replace(",", ""))
    assert in_all == pytest.approx(3 * 65537 / shared.candidate.step_s, rel=1e-3)
    assert "3 micro-batches of 8,193 tokens a rank, of sequences that 8 ranks share over gpu" in text


@pytest.mark.parametrize(
    ("mode", "passes"),
    [("keep", 16 * 2), ("recompute", 16 * 3), ("swap offload.activations.alpha=1", 14 * 3 + 2 * 2),
     ("auto", 16 * 2), ("auto offload.device_bytes=9400000000", None),
     ("stream", 16 * 3)],
)  # fmt: skip
def test_what_a_shared_sequence_takes_is_in_both_tables(mode: str, passes: int | None) -> None:
    """1b: 16 blocks, 32 query heads of 64, of the 8 key-value heads each rank has one; seven eighths of it leave."""
    planned = plan(composed(*SHARED, *f"offload.activations.mode={mode}".split()), PRESETS["dgx-h100"])
    text = show(planned)
    row = re.search(r"^\* .* ([\d.]+) +[\d.]+$", "\n".join(activation_rows(planned)), re.MULTILINE)
    table = re.search(r"^  activations +([\d.]+)$", text, re.MULTILINE)
    assert row and table and row[1] == table[1]
    level = re.search(r"^  gpu +(.*)$", text, re.MULTILINE)
    if passes is None:  # the device has room for products under way, and for no block that keeps
        assert planned.activations is not None and planned.activations.settled.mode == "swap"
        passes = 16 * 3 - planned.activations.settled.keep_last
    assert level and float(level[1].split()[2]) == pytest.approx(
        3 * passes * 2 * 8193 * 64 * (2 * 32 + 2 * 8) * 7 / 8 / 1e9, rel=1e-3
    )


def test_a_shared_sequence_takes_less_of_each_rank_but_more_than_its_part() -> None:
    def taken(*overrides: str) -> float:
        planned = plan(composed(*SHARED, "offload.activations.mode=keep", *overrides), PRESETS["dgx-h100"])
        return planned.candidate.cost.memory["activations"]

    shared, part = taken("train.seq_len=65536"), taken("train.seq_len=8192", "parallel.sequence=''", BATCHES)
    attention = 16 * 2 * 8192 * 32 * 64  # its result is there as attention made it, and as it came back
    assert shared - part == pytest.approx(attention, rel=0.1)
    assert shared < taken("train.seq_len=65536", "parallel.sequence=''", BATCHES) / 7


BATCHES = "train.global_batch_size=24"
"""Three micro-batches a rank again, where ranks have whole sequences."""


def test_what_leaves_hides_behind_what_a_block_sends_too() -> None:
    asked = ("offload=host", "offload.activations.mode=auto", "offload.device_bytes=5500000000")
    config = composed(*SHARED, *asked, "train.seq_len=32768")
    machine, alphas = PRESETS["dgx-h100"], []
    for rate in (4e11, 4e10, 4e9):
        links = tuple(replace(link, bandwidth=rate) if link.name == "gpu" else link for link in machine.links)
        planned = plan(config, replace(machine, links=links))
        assert planned.activations is not None and planned.away is not None
        alphas.append(planned.activations.auto.alpha)
    assert alphas[0] < alphas[1] < alphas[2] == 1
    assert planned.away.waits
    assert "bottleneck sequence over gpu" in show(planned), "of the slowest"


def test_auto_places_a_job_whose_ranks_share_sequences() -> None:
    """What they send over the level is the same for all placements; a run gets it with the levels of the machine."""
    asked = (*SHARED, "parallel=auto", "train.global_batch_size=4", "offload.activations.mode=recompute")
    planned = plan(composed(*asked, "launch.workers=16"), PRESETS["ethernet-25g"])
    assert planned.choice is not None and "limited by" in show(planned)
    one = planned.candidate
    for other in planned.choice.contenders:
        assert other.cost.sent["sequence"] == one.cost.sent["sequence"] and one.cost.sent["sequence"][1] > 0
    config, _ = settle(composed(*asked, "launch.workers=16", "machine=ethernet-25g"), 16)
    assert config.parallel.sequence == "gpu" and config.parallel.sequence_ranks == 8
    assert config.parallel.placement != "auto"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("parallel.sequence=die", "parallel.sequence=die: the levels are node, gpu"),
        ("model.num_heads=12", "parallel.sequence=gpu has 8 ranks, which model.num_heads=12"),
        ("train.seq_len=7", "each needs a token of train.seq_len=7"),
    ],
)
def test_sequences_that_cannot_be_shared_are_refused(wrong: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(composed(*SHARED, "model.num_kv_heads=4", wrong), PRESETS["dgx-h100"])


@pytest.mark.slow
def test_the_command_plans_sequences_over_a_level(atoll: Callable[..., Any]) -> None:
    job = ("model=1b", "parallel=zero3", "parallel.sequence=gpu", "launch.workers=16", "train.global_batch_size=2",
           "train.seq_len=131072", "machine=dgx-h100")  # fmt: skip
    done = atoll("plan", *job, "experiment=longcontext", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    for said in (
        "1 micro-batch of 16,384 tokens a rank, of sequences that 8 ranks share over gpu",
        "with away",
        "GB leave at 50 GB/s",
    ):
        assert said in done.stdout, done.stdout
    refused = atoll("plan", *job, "parallel.sequence=rack", CUDA_VISIBLE_DEVICES="")
    assert refused.returncode == 2 and refused.stderr == "atoll: parallel.sequence=rack: the levels are node, gpu\n"


def test_auto_is_planned_with_what_host_memory_holds() -> None:
    """70b, 80 blocks, 4096 tokens: 10.7 GB of inputs and attention's outputs, 5.4 GB of inputs."""
    again = []
    for host_bytes, said in ((10**12, "auto (α = "), (7 * 10**9, "auto (input)"), (3 * 10**9, "auto (input)")):
        asked = ("offload.activations.mode=auto", f"offload.activations.host_bytes={host_bytes}",
                 "offload.device_bytes=79500000000")  # fmt: skip
        planned = plan(composed(*BIG, "parallel=hfsdp", *asked), roomy("dgx-h100"))
        text = "\n".join(activation_rows(planned))
        assert said in text and ("blocks: they are recomputed" in text) == (host_bytes < 5e9), text
        again.append(max(unit.recompute for unit in planned.work.units))
    assert again[0] < again[1] == again[2] == 1


def test_what_host_memory_does_not_hold_is_said() -> None:
    """A run refuses it in its first step. 1b: 16 blocks, 0.54 GB of input and attention's output each."""
    asked = ("experiment=longcontext", "model=1b", "train.seq_len=65536", "offload.activations.mode=swap",
             "offload.activations.alpha=0", "offload.activations.keep_last=0")  # fmt: skip
    for host_bytes, fits in ((88 * 10**8, True), (87 * 10**8, False)):
        planned = plan(composed(*asked, f"offload.activations.host_bytes={host_bytes}"), PRESETS["single"])
        assert ("of host memory for activations" in "\n".join(activation_rows(planned))) == (not fits)


def test_auto_leaves_a_fifth_of_host_memory() -> None:
    """As a run does. 1b: 8.7 GB of inputs and attention's outputs, beside 15.5 GB of states."""
    asked = ("experiment=longcontext", "model=1b", "train.seq_len=65536", "offload.device_bytes=16000000000",
             "offload.activations.keep_last=0")  # fmt: skip
    modes = []
    for host in (31e9, 30e9):
        planned = plan(composed(*asked), replace(PRESETS["single"], memory={"gpu": 80e9, "host": host}))
        assert planned.activations is not None
        modes.append(planned.activations.settled.mode)
    assert modes == ["swap", "input"]


@pytest.mark.slow
def test_drives_behind_host_memory_are_planned_where_they_hide() -> None:
    """1b: 8.7 GB a block at 1,048,576 tokens, which take it 8 s; 0.27 GB at 32,768, which take it 30 ms."""
    chosen = []
    for num_tokens, host_bytes, device_bytes in ((2**20, 88 * 10**9, 12 * 10**10), (2**15, 2 * 10**9, 145 * 10**8)):
        asked = ("experiment=longcontext", "model=1b", f"train.seq_len={num_tokens}", "offload.nvme_tbw=600",
                 "offload.activations.keep_last=0", f"offload.activations.host_bytes={host_bytes}",
                 f"offload.device_bytes={device_bytes}")  # fmt: skip
        planned = plan(composed(*asked, "offload.nvme_path=[/drive]"), roomy("single"))
        marked = next(line for line in activation_rows(planned) if line.startswith("*"))
        chosen.append(re.sub(" +", " ", marked))
        said = ("go on to NVMe at 2.3 GB/s" in activation_rows(planned)[-1], "TB a day" in show(planned))
        assert said == (num_tokens == 2**20,) * 2
    assert chosen[0].endswith(" 81.250 48.750") and "(α = 0.00)" in chosen[0]
    assert chosen[1].endswith(" 0.000") and "(input)" in chosen[1]


def test_a_model_that_fake_tensors_do_not_run_is_estimated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of experts' products in 32 bits there are none."""
    transformers = pytest.importorskip("transformers")
    transformers.MixtralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    ).save_pretrained(tmp_path)  # fmt: skip
    config = composed(
        "model=hf", f"model.path={tmp_path}", "model.from_scratch=true", "launch.workers=1", "train.dtype=fp32"
    )
    planned = plan(config, PRESETS["single"])
    assert planned.activations is None and planned.candidate.cost.memory["activations"] > 0
    assert "activations are estimated from layers' widths alone" in caplog.text
