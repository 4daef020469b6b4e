"""Every shipped preset composes into the frozen dataclasses, and those check themselves."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from launch.config import CONF, Config, register, to_config
from launch.keys import keys
from trainer.job import Job
from trainer.options import HFOptions, LlamaOptions

NEEDED = {
    "data=text": ["data.paths=[a.txt]"],
    "data=jsonl": ["data.paths=[a.jsonl]"],
    "data=parquet": ["data.paths=[a.parquet]"],
    "data=datasets": ["data.paths=[a]"],
    "model=hf": ["model.path=a"],
    "experiment=finetune_hf": ["model.path=a", "data.paths=[a.txt]"],
}
"""What a preset leaves to the user."""


def composed(*overrides: str) -> Config:
    register()
    with initialize_config_module("conf", version_base="1.3"):
        return to_config(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize("preset", sorted(f"{file.parent.name}={file.stem}" for file in CONF.glob("*/*.yaml")))
def test_composes(preset: str) -> None:
    assert isinstance(composed(preset, *NEEDED.get(preset, [])), Config)


def test_the_default_job() -> None:
    config = composed()
    assert config.run_name == "tiny-stdlib" and config.parallel.placement == "zero3"
    assert type(config.job()) is Job


def test_a_model_preset_brings_its_own_keys() -> None:
    assert isinstance(composed().model, LlamaOptions)
    assert isinstance(composed("model=hf", "model.path=a").model, HFOptions)


def test_options_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        composed().train.steps = 3  # type: ignore[misc]


def test_options_check_themselves() -> None:
    with pytest.raises(ValueError, match=r"train\.clip_norm=-1"):
        composed("train.clip_norm=-1")


def test_keys_of_the_users_own_names() -> None:
    assert composed("parallel.levels={node:2,gpu:4}").parallel.levels == {"node": 2, "gpu": 4}
    assert list(composed("parallel.levels.node=2", "parallel.levels.gpu=1").parallel.levels) == ["node", "gpu"]
    model = composed("model=hf", "model.path=a", "model.overrides.num_hidden_layers=2").model
    assert isinstance(model, HFOptions) and model.overrides == {"num_hidden_layers": "2"}


@pytest.mark.parametrize("value", ["true", "True", "auto", "never", "300"])
def test_resume_as_it_is_typed(value: str) -> None:
    assert composed(f"run.resume={value}").run.resume == value.lower()


def test_every_key_has_a_default_that_the_help_shows() -> None:
    assert keys()["model.path"].name == "model.path"
    assert keys()["train.clip_norm"].type == "float | null"
    assert keys()["logger.plot"].default == "true"


def test_presets_say_nothing_that_no_dataclass_has() -> None:
    assert not [file for file in CONF.glob("*/*.yml")], "a preset's file ends in .yaml"
    assert Path(CONF / "config.yaml").is_file()
