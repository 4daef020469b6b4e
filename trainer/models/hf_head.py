"""The head of a Hugging Face model, with the chunked loss in place of its own.

Some models scale their logits or bend them by a soft cap. Which, is found by trying: each rule that the config speaks
of is held against the model's own forward while the model is built, and a model that none fits is refused.
"""

import itertools

import torch
import transformers
from torch import Tensor, nn

from trainer.models.loss import linear_cross_entropy

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


class Head(nn.Module):
    """The output projection and its loss: one unit, so its logits never leave it."""

    def __init__(self, output: nn.Linear, scale: float, softcap: float | None, chunk_tokens: int) -> None:
        super().__init__()
        self.output, self.scale, self.softcap, self.chunk_tokens = output, scale, softcap, chunk_tokens

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.scale != 1:
            hidden = hidden * self.scale
        if targets is None:
            return bend(self.output(hidden[:, -1]), self.softcap)
        weight, bias = self.output.weight, self.output.bias
        return linear_cross_entropy(
            hidden, weight, targets, chunk_tokens=self.chunk_tokens, bias=bias, softcap=self.softcap
        )


def bend(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logit_rule(causal_lm: transformers.PreTrainedModel) -> tuple[float, float | None]:
    """The scale of the hidden states and the soft cap with which our head gives the logits of `causal_lm`.

    Read off the model itself: its own forward runs with its base replaced by random hidden states and its output by a
    tiny projection. ValueError if none of the rules that its config speaks of gives the same logits.
    """
    config, name = causal_lm.config.get_text_config(), type(causal_lm).__name__
    output = causal_lm.get_output_embeddings()
    if causal_lm.base_model is causal_lm or type(output) is not nn.Linear:
        raise ValueError(f"{name} cannot be cut into a base model and an output projection: it is not supported")
    generator = torch.Generator().manual_seed(0)
    hidden = 4 * torch.randn(1, 2, output.in_features, generator=generator)
    tiny = nn.Linear(output.in_features, 8, bias=output.bias is not None)
    for parameter in tiny.parameters():
        nn.init.normal_(parameter, generator=generator)
    with torch.no_grad():
        expected = _own_logits(causal_lm, hidden, tiny)
        scales = [factor for c in _set_fields(config, _SCALES) for factor in (c, 1 / c)]
        softcaps = _set_fields(config, _SOFTCAPS)
        for scale, softcap in itertools.product([1.0, *scales], [None, *softcaps]):
            if torch.allclose(bend(tiny(hidden * scale), softcap), expected, rtol=1e-4, atol=1e-4):
                return scale, softcap
    raise ValueError(f"{name} changes its logits in a way that is not supported, its loss would be wrong")


def _own_logits(causal_lm: transformers.PreTrainedModel, hidden: Tensor, output: nn.Linear) -> Tensor:
    """What the forward of `causal_lm` makes of `hidden` with this output projection; the model is left as it was."""
    own_output = causal_lm.get_output_embeddings()
    bases = {causal_lm.base_model, causal_lm.get_decoder()}  # a few models call a part of their base
    for base in bases:
        base.forward = lambda *_, **__: _BaseOutput(hidden)
    causal_lm.set_output_embeddings(output)
    try:
        logits: Tensor = causal_lm(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits
        return logits
    except Exception as error:  # whatever a forward that expects more of its base may raise
        raise ValueError(f"{type(causal_lm).__name__} is not supported: {error}") from error
    finally:
        causal_lm.set_output_embeddings(own_output)
        for base in bases:
            del base.forward


class _BaseOutput:
    """Stands for the output of any base model: hidden states by name or as the first of a tuple, all else None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, _index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, _name: str) -> None:
        return None


def _set_fields(config: transformers.PreTrainedConfig, names: tuple[str, ...]) -> list[float]:
    return [value for name in names if (value := getattr(config, name, None))]
