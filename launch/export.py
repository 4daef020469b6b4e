"""``atoll export``: a run's checkpoint as a folder that `transformers` loads."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from checkpoint import CheckpointOptions, Checkpoints
from offload.state import MASTER
from trainer.models.export import export_safetensors
from trainer.options import HFOptions, LlamaOptions, ModelOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODELS: dict[str, type[ModelOptions]] = {"LlamaOptions": LlamaOptions, "HFOptions": HFOptions}


def export(run: str, to: str, *, step: int | None = None, dtype: str = "fp32") -> str:
    """Write the weights of the newest checkpoint, or of that of `step`, to the new folder `to`; says what was done.

    run: a run's folder, or its name in ``runs/``. ValueError where there is no such run, step or dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: choose one of {', '.join(DTYPES)}")
    folder = _run_folder(run)
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    url = config["checkpoint"]["url"] or str(folder / "checkpoints")
    checkpoints = Checkpoints(url, CheckpointOptions())
    steps = checkpoints.steps()
    if not steps or step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ValueError(
            f"{'no checkpoint' if step is None else f'step={step}'}: {url} holds checkpoints of steps {there}"
        )
    reader = checkpoints.open(step if step is not None else steps[-1])
    shapes = {name: reader.shape(name, MASTER) for name in reader.names() if MASTER in reader.kinds(name)}
    saved = reader.meta["config"]
    export_safetensors(
        reader.read, shapes, _model_options(saved["model"]), to, DTYPES[dtype], seq_len=saved["train"]["seq_len"]
    )
    return (
        f"step {reader.step} of {folder} is in {to}, {dtype}: transformers.AutoModelForCausalLM.from_pretrained({to!r})"
    )


def _run_folder(run: str) -> Path:
    for folder in (Path(run), Path("runs") / run):
        if (folder / "config.yaml").is_file():
            return folder
    there = ", ".join(sorted(file.parent.name for file in Path("runs").glob("*/config.yaml"))) or "no run"
    raise ValueError(f"run={run}: there is no such folder with a config.yaml, and runs/ holds {there}")


def _model_options(plain: dict[str, Any]) -> ModelOptions:
    options = dict(plain)
    return MODELS[options.pop("class")](**options)
