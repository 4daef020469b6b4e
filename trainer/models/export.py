"""Writes trained weights as a folder that `transformers` loads: ``config.json``, safetensors shards and their index.

Tensors are read and written shard by shard: no more than one shard is in memory. The folder is complete once
``config.json`` is there, which is written last.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from offload.state import MASTER, Read
from trainer.options import HFOptions, LlamaOptions, ModelOptions

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
                    "chat_template.*", "generation_config.json")  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor of the exported model: elements of one of ours from `start` on."""

    hf_name: str
    name: str
    start: int
    shape: tuple[int, ...]


def export_safetensors(
    read: Read,
    names_shapes: dict[str, tuple[int, ...]],
    model_options: ModelOptions,
    folder: str | Path,
    dtype: torch.dtype,
    max_shard_bytes: int = 4 << 30,
    *,
    seq_len: int = 2048,
) -> None:
    """Write the weights that `read` gives, in `dtype`, to `folder`, which must be new or empty.

    names_shapes: our parameters' names and shapes. seq_len: the longest sequence, for the config of a Llama. A tensor
    larger than `max_shard_bytes` is a shard alone. ValueError for a folder in use.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"to={folder}: cannot be made ({error.strerror}); name another folder") from error
    if any(folder.iterdir()):
        raise ValueError(f"to={folder} is not empty; export into a new folder")
    if isinstance(model_options, HFOptions):
        tensors, config, read = _hugging_face(read, names_shapes, model_options)
        _copy_tokenizer(Path(model_options.path), folder)
    else:
        assert isinstance(model_options, LlamaOptions)
        tensors = _llama_tensors(names_shapes, model_options)
        config = llama_config(model_options, names_shapes["embed.weight"][0], seq_len)
    _write_shards(read, list(_cut(tensors, dtype.itemsize, max_shard_bytes)), folder, dtype)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def llama_config(options: LlamaOptions, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """``config.json`` of the Hugging Face model that `options` describe."""
    if options.dim % options.num_heads:
        raise ValueError(
            f"transformers takes only a Llama whose model.dim={options.dim} is divisible by "
            f"model.num_heads={options.num_heads}; this one can be trained and resumed, not exported"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": options.dim,
        "intermediate_size": options.ffn_dim,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_heads,
        "num_key_value_heads": options.num_kv_heads,
        "head_dim": options.head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": seq_len,
        "rms_norm_eps": options.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": options.rope_theta},
        "rope_theta": options.rope_theta,  # where readers older than transformers 5 look
        "tie_word_embeddings": options.tie_embeddings,
        "initializer_range": options.init_std,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _llama_tensors(shapes: dict[str, tuple[int, ...]], options: LlamaOptions) -> Iterator[Tensor]:
    """Every tensor by its Hugging Face name; the fused ones taken apart by rows."""

    def parts(name: str, hf_names: dict[str, int]) -> Iterator[Tensor]:
        row = 0
        columns = shapes[name][1:]
        for hf_name, rows in hf_names.items():
            yield Tensor(hf_name, name, row * prod(columns), (rows, *columns))
            row += rows
        assert row == shapes[name][0], f"{name}: {shapes[name]} is not the stack of {hf_names}"

    q, kv = options.num_heads * options.head_dim, options.num_kv_heads * options.head_dim
    yield from parts("embed.weight", {"model.embed_tokens.weight": shapes["embed.weight"][0]})
    for i in range(options.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        whole = {
            f"{ours}.attention_norm.weight": f"{theirs}.input_layernorm.weight",
            f"{ours}.attention.out.weight": f"{attention}.o_proj.weight",
            f"{ours}.mlp_norm.weight": f"{theirs}.post_attention_layernorm.weight",
            f"{ours}.mlp.down.weight": f"{mlp}.down_proj.weight",
        }
        for name, hf_name in whole.items():
            yield from parts(name, {hf_name: shapes[name][0]})
        qkv = {f"{attention}.q_proj.weight": q, f"{attention}.k_proj.weight": kv, f"{attention}.v_proj.weight": kv}
        yield from parts(f"{ours}.attention.qkv.weight", qkv)
        gate_up = {f"{mlp}.gate_proj.weight": options.ffn_dim, f"{mlp}.up_proj.weight": options.ffn_dim}
        yield from parts(f"{ours}.mlp.gate_up.weight", gate_up)
    yield from parts("head.norm.weight", {"model.norm.weight": shapes["head.norm.weight"][0]})
    if not options.tie_embeddings:
        yield from parts("head.output.weight", {"lm_head.weight": shapes["head.output.weight"][0]})


def _hugging_face(
    read: Read, shapes: dict[str, tuple[int, ...]], options: HFOptions
) -> tuple[Iterator[Tensor], dict[str, Any], Read]:
    """The tensors under their own names, the config with the overrides in it, and what reads the saved buffers too."""
    from trainer.models.hf import HFModel

    model = HFModel(options, vocab_size=1, seq_len=1, dtype=torch.float32, device=torch.device("cpu"))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.hf_names}

    def read_all(name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        return buffers[name].flatten()[start:stop] if name in buffers else read(name, kind, start, stop)

    shapes = shapes | {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    tensors = (Tensor(model.hf_names[name][0], name, 0, shape) for name, shape in shapes.items())
    return tensors, model.config.to_dict(), read_all


def _cut(tensors: Iterator[Tensor], item_bytes: int, max_shard_bytes: int) -> Iterator[list[Tensor]]:
    """Runs of tensors of at most `max_shard_bytes` together, or of one."""
    shard: list[Tensor] = []
    size_bytes = 0
    for tensor in tensors:
        tensor_bytes = prod(tensor.shape) * item_bytes
        if shard and size_bytes + tensor_bytes > max_shard_bytes:
            yield shard
            shard, size_bytes = [], 0
        shard.append(tensor)
        size_bytes += tensor_bytes
    yield shard


def _write_shards(read: Read, shards: list[list[Tensor]], folder: Path, dtype: torch.dtype) -> None:
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        values: dict[str, torch.Tensor] = {}
        for t in shard:
            elements = read(t.name, MASTER, t.start, t.start + prod(t.shape))
            values[t.hf_name] = elements.to("cpu", dtype).reshape(t.shape).contiguous()
        save_file(values, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, file)
    if len(shards) > 1:
        total = sum(prod(t.shape) for shard in shards for t in shard) * dtype.itemsize
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy(file, folder / file.name)
