"""A sequence over 2 and 4 ranks: loss and gradients are those of one rank with the whole sequence."""

import json
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from offload.activations.blocks import Activations
from offload.options import ActivationOptions
from parallel import Mesh
from parallel.sequence import SequenceParallel, _stand_in
from tests.offload.leaving import llama_of, one_thread
from tests.scripts import lines_of
from trainer.options import LlamaOptions

__all__ = ["one_thread"]
CASES = {
    "even": {"heads": 8, "kv": 8, "tokens": 32, "batch": 1},
    "uneven, several sequences": {"heads": 8, "kv": 4, "tokens": 37, "batch": 3},
    "fewer key-value heads than ranks": {"heads": 8, "kv": 1, "tokens": 30, "batch": 2},
    "key-value heads that ranks do not divide": {"heads": 12, "kv": 6, "tokens": 33, "batch": 1},
    "activations swapped": {"heads": 8, "kv": 2, "tokens": 37, "batch": 2, "activations": ["swap", 1.0]},
    "products recomputed": {"heads": 8, "kv": 2, "tokens": 37, "batch": 2, "activations": ["swap", 0.0]},
    "inputs alone swapped": {"heads": 8, "kv": 2, "tokens": 37, "batch": 2, "activations": ["input", None]},
    "by tiles": {"heads": 8, "kv": 2, "tokens": 37, "batch": 2, "activations": ["stream", 9]},
    "by tiles, inputs alone": {"heads": 8, "kv": 8, "tokens": 37, "batch": 1, "activations": ["stream_input", 5]},
    "by tiles, fewer key-value heads": {"heads": 8, "kv": 1, "tokens": 30, "batch": 3, "activations": ["stream", 8]},
    "by tiles, key-value heads repeated": {
        "heads": 12,
        "kv": 6,
        "tokens": 33,
        "batch": 1,
        "activations": ["stream_input", 4],
    },
    "by tiles of a token": {"heads": 8, "kv": 4, "tokens": 31, "batch": 1, "activations": ["stream", 1]},
    "by one tile": {"heads": 8, "kv": 4, "tokens": 33, "batch": 2, "activations": ["stream", 64]},
    "heads that ranks do not divide": {"heads": 5, "kv": 5, "tokens": 16, "batch": 1},
    "fewer tokens than ranks": {"heads": 8, "kv": 8, "tokens": 1, "batch": 1},
}

WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


@cache
def answers(world: int) -> dict[str, float | str]:
    cases = json.dumps(list(CASES.values()))
    lines = lines_of("tests/parallel/sequence_world.py", str(world), timeout_s=100, given=cases)
    return dict(zip(CASES, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", list(CASES)[:13])
def test_loss_and_gradients_are_those_of_one_rank(world: int, case: str) -> None:
    difference = answers(world)[case]
    assert isinstance(difference, float), difference
    assert difference < 1e-12


@pytest.mark.parametrize("world", WORLDS)
def test_heads_that_cannot_be_shared_are_refused(world: int) -> None:
    assert f"5 are not divisible by {world}" in str(answers(world)["heads that ranks do not divide"])


@pytest.mark.parametrize("world", WORLDS)
def test_too_short_a_sequence_is_refused(world: int) -> None:
    assert f"1 tokens a sequence over {world} ranks" in str(answers(world)["fewer tokens than ranks"])


@pytest.mark.parametrize(("num_tokens", "size"), [(8, 4), (10, 4), (7, 2), (5, 5)])
def test_parts_are_the_whole(num_tokens: int, size: int) -> None:
    sequence, parts = SequenceParallel(None), []
    sequence.size = size
    for sequence.rank in range(size):
        part = sequence.part(num_tokens)
        parts += range(num_tokens)[part]
        assert sequence.share(num_tokens) == len(range(num_tokens)[part]) / num_tokens
    assert parts == list(range(num_tokens))


def test_one_rank_alone_is_plain_attention() -> None:
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    with SequenceParallel.of(Mesh({"node": 1}), "node").attention(9):
        found = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True))


def test_attention_that_has_ended_keeps_no_group() -> None:
    """One that is kept keeps its connections, whatever `dist.destroy_process_group` does."""
    sequence = SequenceParallel.pretended(2)
    with sequence.attention(8):
        assert F.scaled_dot_product_attention is _stand_in
    kept = weakref.ref(sequence)
    del sequence
    assert kept() is None


def test_a_level_that_the_mesh_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="parallel.sequence=gpu: the levels are node"):
        SequenceParallel.of(Mesh({"node": 1}), "gpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"attn_mask": torch.ones(4, 4)}, "no attention mask"), ({"dropout_p": 0.1}, "no dropout"), ({}, "got \\[4\\]")],
)
def test_what_attention_over_ranks_cannot_do_is_refused(options: dict, message: str) -> None:
    sequence = SequenceParallel(None)
    sequence.size = 2  # checked before anything is sent
    q = torch.randn(1, 4, 4, 8)
    with pytest.raises(ValueError, match=message):
        sequence.attend(q, q, q, 8 if options else 10, F.scaled_dot_product_attention, **options)


def test_values_may_be_narrower_than_keys() -> None:
    """As in DeepSeek's attention. With this rank's own tokens in the place of the others': those of the whole."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, size, generator=generator) for size in (16, 16, 12))
    twice = [torch.cat((t, t), dim=2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*twice, is_causal=True)
    found = SequenceParallel.pretended(2).attend(q, k, v, 12, F.scaled_dot_product_attention, is_causal=True)
    torch.testing.assert_close(found[:, :2], expected[:, :2, :6])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", ["stream", "stream_input"])
def test_tiles_of_a_rank_that_talks_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, device: str
) -> None:
    """All that is sent is really sent, on NCCL's stream, while what left and came back is poisoned: the gradients of a
    rank that is alone. Of each of 4 tiles 3 times in a block's forward, and 6 in its backward."""
    sent: list[int] = []
    send = dist.all_to_all_single
    where, cuda = torch.device(device), device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float64
    length, head_dim = (600, 64) if cuda else (60, 8)
    options = LlamaOptions(dim=64, ffn_dim=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=head_dim)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1
    )
    try:
        sequence, found = SequenceParallel(dist.group.WORLD), []
        for shared in (False, True):
            model = llama_of(options, vocab_size=64, seq_len=length, dtype=dtype, device=where)
            stream = Activations(ActivationOptions(mode=mode, tile_tokens=2 * length // 4), where, poison=True)
            stream.wrap(model.blocks())
            if shared:
                monkeypatch.setattr(sequence, "_num_tokens", length)
                monkeypatch.setattr(_stand_in, "spread", sequence, raising=False)
                monkeypatch.setattr(F, "scaled_dot_product_attention", _stand_in)
                monkeypatch.setattr(dist, "all_to_all_single", lambda *a, **k: (sent.append(1), send(*a, **k))[1])
            rows = torch.randint(64, (2, length + 1), generator=torch.Generator().manual_seed(1)).to(where)
            for _ in range(3):
                model.zero_grad()
                model(rows[:, :-1], rows[:, 1:]).backward()
            found.append([p.grad.float() for p in model.parameters()])
            stream.close()
    finally:
        dist.destroy_process_group()
    assert len(sent) == 3 * options.num_layers * 4 * (3 + 6)
    for one, alone in zip(*found, strict=True):
        assert float((one - alone).norm() / alone.norm()) < (0.02 if cuda else 1e-6)
