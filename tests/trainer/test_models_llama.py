"""Our Llama, against transformers' with the same weights."""

from dataclasses import replace

import pytest
import torch

from offload.state import MASTER
from trainer.models import build_model
from trainer.models.export import export_safetensors
from trainer.models.generate import generate
from trainer.options import LlamaOptions

OPTIONS = LlamaOptions(
    dim=48, ffn_dim=80, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16, vocab_size=50, init_std=0.2,
    loss_chunk_tokens=7, rope_theta=500.0,
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def options(request) -> LlamaOptions:
    return replace(OPTIONS, tie_embeddings=request.param)


@pytest.fixture
def build(materialize):
    def build(options: LlamaOptions = OPTIONS, dtype: torch.dtype = torch.float32):
        model = build_model(options, vocab_size=50, seq_len=32, dtype=dtype, device=CPU)
        return materialize(model, model.initial(3, CPU))

    return build


def export(model, options, folder, **kwargs):
    """The exported folder, loaded by transformers."""
    transformers = pytest.importorskip("transformers")
    flat = {name: p.detach().flatten() for name, p in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    export_safetensors(lambda name, kind, a, b: flat[name][a:b], shapes, options, folder, torch.float32, **kwargs)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(50, (3, 33), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def test_loss_logits_and_gradients_equal_those_of_transformers(build, options, tmp_path):
    model = build(options)
    theirs = export(model, options, tmp_path)
    tokens, targets = batch()
    logits = theirs(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = model(tokens, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens), logits[:, -1], rtol=1e-5, atol=1e-5)

    loss.backward()
    expected.backward()
    theirs = {name: p.grad for name, p in theirs.named_parameters()}
    qkv = torch.cat([theirs[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"])
    gate_up = torch.cat([theirs[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up")])
    for name, gradient in {
        "layers.1.attention.qkv.weight": qkv,
        "layers.0.mlp.gate_up.weight": gate_up,
        "embed.weight": theirs["model.embed_tokens.weight"],
        "head.norm.weight": theirs["model.norm.weight"],
    }.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)


def test_an_export_in_many_shards_loads(build, tmp_path):
    model = build()
    theirs = export(model, OPTIONS, tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens, _ = batch()
    torch.testing.assert_close(theirs(input_ids=tokens).logits[:, -1], model(tokens), rtol=1e-5, atol=1e-5)


def test_an_export_does_not_write_over_files(build, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="not empty"):
        export(build(), OPTIONS, tmp_path)


def test_units_run_in_order_and_hold_every_parameter(build, options):
    model = build(options)
    ran = []
    for unit in model.units():
        unit.register_forward_hook(lambda module, *_: ran.append(module))
    model(*batch())
    assert ran == model.units()
    assert {p for unit in model.units() for p in unit.parameters()} == set(model.parameters())
    assert model.blocks() == model.units()[1:-1]


def test_parameters_are_on_meta_and_buffers_are_real():
    model = build_model(OPTIONS, vocab_size=50, seq_len=32, dtype=torch.bfloat16, device=CPU)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(b.device == CPU and b.dtype == torch.float32 for b in model.buffers())


def test_flops_a_token_by_hand(options):
    """That is 6 n + 6 L a S for n parameters in all, the embedding counted, and a the width of attention."""
    model = build_model(options, vocab_size=50, seq_len=32, dtype=torch.float32, device=CPU)
    block = 48 * (6 + 2 + 2) * 16 + 6 * 16 * 48 + 3 * 48 * 80 + 2 * 48
    num_parameters = 50 * 48 * (1 if options.tie_embeddings else 2) + 2 * block + 48
    assert model.flops_per_token(32) == 6 * num_parameters + 6 * 2 * (6 * 16) * 32


def test_first_weights_do_not_depend_on_how_they_are_cut(monkeypatch):
    monkeypatch.setattr("trainer.models.random_init._BLOCK", 100)
    read = build_model(OPTIONS, vocab_size=50, seq_len=32, dtype=torch.float32, device=CPU).initial(3, CPU)
    whole = read("embed.weight", MASTER, 0, 2400)
    parts = [read("embed.weight", MASTER, *cut) for cut in ((0, 99), (99, 100), (100, 1234), (1234, 2400))]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.unique().numel() == 2400  # no block repeats another


def test_first_weights_depend_on_seed_and_name_and_have_the_asked_spread():
    model = build_model(OPTIONS, vocab_size=50, seq_len=32, dtype=torch.float32, device=CPU)
    first, again, other = (model.initial(seed, CPU) for seed in (3, 3, 4))
    size = model.get_parameter("layers.0.mlp.down.weight").numel()
    values = first("layers.0.mlp.down.weight", MASTER, 0, size)
    assert torch.equal(values, again("layers.0.mlp.down.weight", MASTER, 0, size))
    assert not torch.equal(values, other("layers.0.mlp.down.weight", MASTER, 0, size))
    assert not torch.equal(values, first("layers.1.mlp.down.weight", MASTER, 0, size))
    assert values.std() == pytest.approx(0.2 / 2, rel=0.05)  # 1 / sqrt(2 L), L = 2
    assert first("embed.weight", MASTER, 0, 2400).std() == pytest.approx(0.2, rel=0.05)
    assert (first("head.norm.weight", MASTER, 0, 48) == 1).all()
    with pytest.raises(KeyError):
        first("embed.weight", "exp_avg", 0, 1)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(ValueError, match="model.vocab_size=51"):
        build_model(OPTIONS, vocab_size=51, seq_len=32, dtype=torch.float32, device=CPU)


def test_a_sequence_longer_than_the_tables_is_refused(build):
    with pytest.raises(ValueError, match="train.seq_len=32"):
        build()(torch.zeros(1, 33, dtype=torch.long))


def test_generation_repeats_with_its_seed_and_slides_its_window(build):
    model = build()
    draw = [generate(model, [1, 2], 40, seq_len=32, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert len(draw[0]) == 40 and draw[0] == draw[1] != draw[2]
    greedy = generate(model, [1, 2], 3, seq_len=32, temperature=0, seed=0)
    assert greedy[0] == model(torch.tensor([[1, 2]])).argmax()


@pytest.mark.gpu
def test_a_compiled_bf16_model_on_a_gpu_agrees_with_fp32_on_a_cpu(materialize):
    from trainer.models.attention import attention_backends

    device = torch.device("cuda")
    losses, gradients = [], []
    for on, dtype in ((CPU, torch.float32), (device, torch.bfloat16)):
        model = build_model(OPTIONS, vocab_size=50, seq_len=32, dtype=dtype, device=on)
        read = model.initial(3, CPU)
        materialize(model, lambda *piece: read(*piece).to(on))  # noqa: B023 used at once
        with attention_backends(on):
            for block in model.blocks() if on == device else []:
                block.compile()
            loss = model(*(t.to(on) for t in batch()))
            loss.backward()
        losses.append(loss.item())
        gradients.append(model.get_parameter("layers.0.mlp.gate_up.weight").grad.float().cpu())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()
