"""Any Hugging Face causal language model, cut into units like our own.

The model is taken apart: its base (embedding, blocks, last norm) gives hidden states, and our head turns them into the
loss through the model's output projection, so the whole logits matrix never exists.

Invariant: `hf_names` gives each of our names its name in a Hugging Face checkpoint.
"""

import difflib
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from offload.state import Read
from trainer.models.base import LanguageModel
from trainer.models.hf_head import Head, logit_rule
from trainer.models.hf_weights import InitRuleRead, SafetensorsRead
from trainer.options import HFOptions

_WINDOWED = {"sliding_attention", "chunked_attention"}
"""Types of layers whose attention sees the last tokens alone."""


class HFModel(LanguageModel):
    def __init__(
        self, options: HFOptions, *, vocab_size: int, seq_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """vocab_size: the tokenizer's; seq_len: the longest sequence. ValueError for what cannot be trained."""
        super().__init__()
        self.options = options
        self.config = load_config(options)
        _check(self.config, vocab_size, seq_len)
        self.vocab_size = self.config.get_text_config().vocab_size
        causal_lm = build_on_meta(self.config, dtype)
        scale, softcap = logit_rule(causal_lm)
        self.model: Any = causal_lm.base_model
        self.head = Head(causal_lm.get_output_embeddings(), scale, softcap, options.loss_chunk_tokens)
        self.hf_names = self._match(causal_lm)
        for module in self.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
        self._files = None if options.from_scratch else self._open(causal_lm.base_model_prefix)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, start: int = 0) -> Tensor:
        where = torch.arange(start, start + tokens.size(1), device=tokens.device).unsqueeze(0) if start else None
        out: Tensor = self.head(self.model(input_ids=tokens, position_ids=where).last_hidden_state, targets)
        return out

    def units(self) -> list[nn.Module]:
        embed = self.model.get_input_embeddings()
        tied = embed.weight is self.head.output.weight
        return [*([] if tied else [embed]), *self.blocks(), self.head]

    def blocks(self) -> list[nn.Module]:
        """The members of the list of modules that has the most parameters."""
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList) and len(module)]
        largest: nn.ModuleList = max(lists, key=_num_parameters)
        return list(largest)

    @property
    def num_heads(self) -> tuple[int, int]:
        config = self.config.get_text_config()
        return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    @property
    def head_dim(self) -> int:
        config = self.config.get_text_config()
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def mask_bytes(self, batch_size: int, seq_len: int) -> int:
        """One mask for each type of layer: torch's attention is given a bool one (seq_len, seq_len) where a window is
        no longer than the sequence, any other always one (batch_size, seq_len, seq_len) of the weights' dtype."""
        config = self.config.get_text_config()
        types = {"full_attention", *_WINDOWED} & set(getattr(config, "layer_types", None) or ())
        if not hasattr(config, "num_attention_heads"):  # as of Mamba
            return 0
        if self.model.config._attn_implementation == "sdpa":
            return (len(types & _WINDOWED) or 1) * seq_len**2 if self._window(seq_len + 1) else 0
        return (len(types) or 1) * next(self.parameters()).element_size() * batch_size * seq_len**2

    def _window(self, seq_len: int) -> str:
        """Which field of the config has attention see less than `seq_len` tokens; empty where none does."""
        config = self.config.get_text_config()
        types = set(getattr(config, "layer_types", None) or ())
        for field in ("sliding_window", "attention_chunk_size"):
            window = getattr(config, field, None)
            if window and window < seq_len and (not types or types & _WINDOWED):
                return field
        return ""

    def check_shared(self, seq_len: int, ranks: int) -> None:
        if why := self._unshared(seq_len, ranks):
            raise ValueError(
                f"parallel.sequence: a {type(self.model).__name__} cannot share sequences over ranks, {why}; leave "
                "parallel.sequence out"
            )

    def _unshared(self, seq_len: int, ranks: int) -> str:
        config = self.config.get_text_config()
        types = set(getattr(config, "layer_types", None) or ())
        if getattr(self.model, "_is_stateful", False) or types - {"full_attention", *_WINDOWED}:
            return f"as its tokens meet in more than attention ({', '.join(sorted(types)) or 'it has a state'})"
        if self.model.config._attn_implementation != "sdpa":
            return "as its attention is its own, not torch's scaled_dot_product_attention"
        if field := self._window(seq_len):
            return f"as its {field}={getattr(config, field)} is less than train.seq_len={seq_len}: lower that"
        for field in ("attention_dropout", "attn_pdrop"):
            if getattr(config, field, None):
                return f"as its attention drops at random: set model.overrides.{field}=0"
        if seq_len < 2 * ranks:  # of one token transformers asks for attention that is not causal
            return f"of which each of {ranks} needs two tokens of train.seq_len={seq_len}"
        return ""

    def flops_per_token(self, seq_len: int) -> int:
        """6 N + 6 L H E S, where N counts every parameter but the experts that a token does not visit."""
        config = self.config.get_text_config()
        attention = 0  # as of Mamba
        if hasattr(config, "num_attention_heads"):
            attention = config.num_hidden_layers * config.num_attention_heads * self.head_dim * seq_len
        num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name) if num_experts else 0
        idle = experts - experts * config.num_experts_per_tok // num_experts if num_experts else 0
        return int(6 * (_num_parameters(self) - idle + attention))

    def initial(self, seed: int, device: torch.device) -> Read:
        """The folder's weights, or random ones by the model's own rule, each a function of the seed and the name."""
        if self._files is not None:
            return self._files.on(device)
        return InitRuleRead(build_on_meta(self.config, torch.float32), self.hf_names, seed, device)

    def _match(self, causal_lm: transformers.PreTrainedModel) -> dict[str, list[str]]:
        """The names in `causal_lm`, several where tied, of each parameter and saved buffer of this model."""
        names = defaultdict(list)
        for name, tensor in causal_lm.state_dict(keep_vars=True).items():
            names[tensor].append(name)
        ours = {tensor: name for name, tensor in reversed(self.state_dict(keep_vars=True).items())}
        if lost := [names[tensor][0] for tensor in names if tensor not in ours]:
            raise ValueError(f"model.path={self.options.path}: {_few(lost)} lie outside the base model and its output")
        return {name: names[tensor] for tensor, name in ours.items()}

    def _open(self, prefix: str) -> SafetensorsRead:
        """The folder's weights, checked against the model; saved buffers are read at once."""
        tensors = {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if name in self.hf_names}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        files = SafetensorsRead(Path(self.options.path), shapes, self.hf_names, prefix)
        for name, tensor in tensors.items():
            if not isinstance(tensor, nn.Parameter):
                tensor.copy_(files(name, "master", 0, tensor.numel()).view(tensor.shape))
        return files


def load_config(options: HFOptions) -> transformers.PreTrainedConfig:
    """The folder's ``config.json`` with ``model.overrides`` in it."""
    file = options.config_file()
    config: transformers.PreTrainedConfig = transformers.AutoConfig.from_pretrained(file.parent, local_files_only=True)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"model.path={options.path}: its weights are quantized, which cannot be trained")
    changes = {name: _override(config, name, value) for name, value in options.overrides.items()}
    try:  # a new config, not setattr: other fields may follow from those that change
        known, _ = type(config).get_config_dict(file.parent, local_files_only=True)  # knows how they write infinity
        return type(config).from_dict(known | changes | {"use_cache": False})
    except Exception as error:  # of many types, transformers' own among them
        raise ValueError(f"model.overrides={options.overrides}: {error}") from error


def _override(config: transformers.PreTrainedConfig, name: str, value: str) -> Any:
    if not hasattr(config, name):
        near = difflib.get_close_matches(name, config.to_dict(), n=1)
        hint = f"; did you mean model.overrides.{near[0]}?" if near else ""
        raise ValueError(f"model.overrides.{name}: a {type(config).__name__} has no such field{hint}")
    return yaml.safe_load(value)


def _check(config: transformers.PreTrainedConfig, vocab_size: int, seq_len: int) -> None:
    text = config.get_text_config()
    if text.vocab_size < vocab_size:
        raise ValueError(
            f"the model has {text.vocab_size} words, the tokenizer {vocab_size}: set data.tokenizer=<model.path>, "
            f"or with model.from_scratch=true model.overrides.vocab_size={vocab_size}"
        )
    longest = getattr(text, "max_position_embeddings", None) or seq_len
    if seq_len > longest:
        raise ValueError(
            f"train.seq_len={seq_len} is more than the model's max_position_embeddings={longest}; "
            f"lower it, or set model.overrides.max_position_embeddings={seq_len} if its positions extend"
        )
    if getattr(text, "output_router_logits", False):
        raise ValueError("the router's auxiliary loss is not trained: set model.overrides.output_router_logits=false")


def build_on_meta(config: transformers.PreTrainedConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model that `config` describes: parameters on ``meta`` from their registration on, buffers real."""

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # it may return a parameter
    try:
        model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        hook.remove()
    if model.config._attn_implementation != "sdpa":
        warnings.warn(
            f"{type(model).__name__} has no fused attention: its attention takes memory quadratic in train.seq_len",
            stacklevel=2,
        )
    return model


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
