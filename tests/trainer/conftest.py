from collections.abc import Callable

import pytest
from torch import nn

from offload.state import MASTER, Read
from trainer.models import LanguageModel


@pytest.fixture
def materialize() -> Callable[[LanguageModel, Read], LanguageModel]:
    """Gives a model's parameters memory, as an engine does."""
    return fill


def fill(model: LanguageModel, read: Read) -> LanguageModel:
    """Replace the parameters, on ``meta`` until now, by what `read` says; shared ones stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                values = read(f"{prefix}.{name}" if prefix else name, MASTER, 0, parameter.numel())
                made[parameter] = nn.Parameter(values.view(parameter.shape).to(parameter.dtype))
            setattr(module, name, made[parameter])
    return model
