"""Hugging Face models in units: the same loss and gradients as their own, the weights read and written by range."""

import json

import pytest
import torch

from offload.state import MASTER
from trainer.models import build_model
from trainer.models.export import export_safetensors
from trainer.options import HFOptions

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
GEMMA = {**SHAPE, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama_tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=1,
    ),  # Conv1D, learned positions, tied
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA, final_logit_softcapping=0.5),  # soft cap, no fused attention
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA),  # a scaled embedding
    "phi": lambda: transformers.PhiConfig(**SHAPE),  # a bias in the output projection
    "cohere": lambda: transformers.CohereConfig(**SHAPE, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SHAPE, logits_scaling=4.0),
}  # fmt: skip


def save(config, folder):
    """A random model of this config, saved to the folder and loaded from it by transformers."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def build(folder, vocab_size: int = 64, seq_len: int = 32, **options):
    options = HFOptions(path=str(folder), loss_chunk_tokens=7, **options)
    return build_model(options, vocab_size=vocab_size, seq_len=seq_len, dtype=torch.float32, device=CPU)


@pytest.fixture
def llama(tmp_path):
    """A folder with a tiny Llama in it."""
    save(CONFIGS["llama"](), tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*no fused attention")
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_the_models_own(name, tmp_path, materialize):
    theirs = save(CONFIGS[name](), tmp_path)
    model = build(tmp_path)
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    materialize(model, model.initial(0, CPU))
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    output = theirs(input_ids=tokens, labels=tokens)
    loss = model(tokens, torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100))
    torch.testing.assert_close(loss, output.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens), output.logits[:, -1], rtol=1e-5, atol=1e-5)

    loss.backward()
    output.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for ours, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[model.hf_names[ours][0]], rtol=1e-4, atol=1e-6)


def test_units_are_the_embedding_the_blocks_and_the_head(llama, tmp_path_factory):
    model = build(llama)
    assert len(model.blocks()) == 2 and len(model.units()) == 4
    tied = tmp_path_factory.mktemp("tied")
    save(CONFIGS["llama_tied"](), tied)
    assert len(build(tied).units()) == 3


@pytest.mark.parametrize("cut", [(0, 64 * 32), (5, 6), (31, 33), (40, 1000), (7, 7)])
def test_any_range_of_a_file_is_read(llama, cut):
    model = build(llama)
    whole = transformers.AutoModelForCausalLM.from_pretrained(llama).model.embed_tokens.weight.detach().flatten()
    read = model.initial(0, CPU)
    assert torch.equal(read("model.embed_tokens.weight", MASTER, *cut), whole[slice(*cut)])


def test_files_without_the_base_models_prefix_are_read(tmp_path, materialize):
    model = save(CONFIGS["gpt2"](), tmp_path)
    model.transformer.save_pretrained(tmp_path)
    ours = build(tmp_path)
    materialize(ours, ours.initial(0, CPU))
    tokens = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(ours(tokens), model.eval()(tokens).logits[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_random_weights_follow_the_models_own_rule(name, tmp_path, materialize):
    theirs = dict(save(CONFIGS[name](), tmp_path).named_parameters())
    model = build(tmp_path, from_scratch=True)
    materialize(model, model.initial(1, CPU))
    for ours, parameter in model.named_parameters():
        expected = theirs[model.hf_names[ours][0]]
        assert parameter.mean().item() == pytest.approx(expected.mean().item(), abs=5e-3)
        assert parameter.std().item() == pytest.approx(expected.std().item(), rel=0.15)
    again = build(tmp_path, from_scratch=True).initial(1, CPU)
    name, parameter = next(model.named_parameters())
    assert torch.equal(again(name, MASTER, 3, 9), parameter.flatten()[3:9])


def test_an_exported_model_loads_with_the_trained_weights(llama, tmp_path, materialize):
    (llama / "tokenizer.json").write_text("{}")
    options = HFOptions(path=str(llama), from_scratch=True, overrides={"num_hidden_layers": "1"})
    model = build(llama, from_scratch=True, overrides={"num_hidden_layers": "1"})
    read = model.initial(1, CPU)
    materialize(model, read)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    export_safetensors(read, shapes, options, tmp_path / "out", torch.float32, 10_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits[:, -1], rtol=1e-5, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_overrides_are_yaml_values(llama):
    model = build(llama, from_scratch=True, overrides={"num_hidden_layers": "3", "tie_word_embeddings": "true"})
    assert len(model.blocks()) == 3 and model.config.tie_word_embeddings is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overrides": {"num_hiden_layers": "3"}}, "did you mean model.overrides.num_hidden_layers"),
        ({"overrides": {"num_hidden_layers": "many"}}, "model.overrides"),
        ({"overrides": {"num_hidden_layers": "3"}}, "9 of the model's 30 tensors are not in its files: model.layers.2"),
        ({"overrides": {"intermediate_size": "50"}}, "has shape"),
        ({"vocab_size": 65}, "the tokenizer 65"),
        ({"seq_len": 65}, "max_position_embeddings=64"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_option_to_change(llama, change, message):
    with pytest.raises(ValueError, match=message):
        build(llama, **change)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model.path"):
        build(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]().to_dict()))
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        build(tmp_path)


def test_logits_changed_in_an_unknown_way_are_refused(llama, monkeypatch):
    own = transformers.LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.logits = output.logits.cos()
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(ValueError, match="changes its logits"):
        build(llama)


UNSHARED = {
    "its own": (CONFIGS["gemma2"], 8, "its attention is its own"),
    "a window": (CONFIGS["gemma3"], 9, "sliding_window=8 is less than train.seq_len=9"),
    "a window of all layers": (lambda: transformers.MistralConfig(**SHAPE, sliding_window=8), 9, "sliding_window=8"),
    "dropout": (lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), 8, "attn_pdrop=0"),
    "a state": (
        lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
        8,
        "in more than",
    ),
    "a state beside attention": (
        lambda: transformers.FalconH1Config(**SHAPE, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
        8,
        "in more than attention",
    ),  # its config has an infinity in it
    "convolutions": (lambda: transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]), 8, "conv, full"),
    "one token": (CONFIGS["llama"], 3, "each of 2 needs two tokens"),
}


@pytest.mark.filterwarnings("ignore:.*no fused attention")
@pytest.mark.parametrize("name", UNSHARED)
def test_models_whose_sequences_ranks_cannot_share(name, tmp_path):
    """Their tokens would meet within a rank alone, and nobody would know."""
    config, seq_len, message = UNSHARED[name]
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, seq_len=seq_len, from_scratch=True).check_shared(seq_len, 2)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gemma3", "phi", "cohere", "granite"])
def test_models_whose_sequences_ranks_share(name, tmp_path):
    CONFIGS[name]().save_pretrained(tmp_path)
    build(tmp_path, seq_len=8, from_scratch=True).check_shared(8, 2)


@pytest.mark.filterwarnings("ignore:.*no fused attention")
@pytest.mark.parametrize("seq_len", [8, 16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "mistral", "qwen3"])
def test_the_masks_that_blocks_are_given_are_counted(name, seq_len, tmp_path, materialize):
    """Of a window, or of attention that is not fused, which take as much as the square of the sequence."""
    windows = {"mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=8)}
    (CONFIGS | windows)[name]().save_pretrained(tmp_path)
    model = build(tmp_path, seq_len=seq_len, from_scratch=True)
    materialize(model, model.initial(0, CPU))
    masks = {}

    def note(_, args, kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.shape[-2:] == (seq_len, seq_len):
                masks[value.data_ptr()] = value.untyped_storage().nbytes()

    for block in model.blocks():
        block.register_forward_pre_hook(note, with_kwargs=True)
    tokens = torch.zeros(2, seq_len, dtype=torch.int64)
    model(tokens, tokens)
    assert model.mask_bytes(2, seq_len) == sum(masks.values())


@pytest.mark.filterwarnings("ignore:.*no fused attention")
def test_a_model_without_attention_has_flops_too(tmp_path):
    transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    model = build(tmp_path, from_scratch=True)
    assert model.flops_per_token(8) == model.flops_per_token(16) == 6 * sum(p.numel() for p in model.parameters())
