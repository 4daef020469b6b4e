"""The whole configuration as frozen dataclasses, and its registration with Hydra.

A part's options are a dataclass beside the code that reads them; here they are joined and given to Hydra as typed
schemas, so that a key that no dataclass has, or a value of another type, is refused while the config is composed.
"""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, DictConfig, OmegaConf

import conf
from launch.options import LaunchOptions
from trainer.job import Job
from trainer.options import HFOptions, LlamaOptions

CONF = Path(conf.__file__).resolve().parent
MODELS = {"llama_schema": LlamaOptions, "hf_schema": HFOptions}
"""The schemas that presets of the group ``model`` start from."""
GROUPS = ("model", "data", "optimizer", "parallel", "offload", "checkpoint", "launch", "logger", "experiment")


@dataclass(frozen=True, kw_only=True)
class Config(Job):
    """A job, and where and how its workers run."""

    launch: LaunchOptions = field(default_factory=LaunchOptions)
    machine: str = ""
    """What ``atoll plan`` and ``parallel=auto`` reckon with: a machine known by name (``dgx-h100``, ``frontier``; a
    wrong one is answered with all), or a file that ``benchmarks/links.py`` wrote."""

    def job(self) -> Job:
        """Without `launch`: what workers get, who need neither Hydra nor this module."""
        return Job(**{item.name: getattr(self, item.name) for item in fields(Job)})


class UserConf(SearchPathPlugin):
    """Adds ``./conf`` of the working folder to Hydra's search path, behind Atoll's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folder = Path.cwd() / "conf"
        if folder.is_dir() and folder.resolve() != CONF:
            search_path.append(provider="working-folder", path=f"file://{folder}")


def register() -> None:
    """Make the schemas and ``./conf`` known to Hydra."""
    root = schema(Config)
    root.model = MISSING  # a preset names its schema: merged into Llama's, a Hugging Face model would keep Llama's keys
    store = ConfigStore.instance()
    store.store(name="schema", node=root)
    for name, options in MODELS.items():
        store.store(group="model", name=name, node=schema(options))
    Plugins.instance().register(UserConf)


def schema(options: type) -> DictConfig:
    """The typed config node of a frozen dataclass, open to be merged into."""
    node: DictConfig = OmegaConf.structured(options)
    _open(node)
    return node


def _open(node: DictConfig) -> None:
    """OmegaConf makes frozen dataclasses read-only, which also refuses what YAML and overrides say of them."""
    OmegaConf.set_readonly(node, None)
    if OmegaConf.get_type(node) is dict:
        OmegaConf.set_struct(node, False)  # a level, or a field of a Hugging Face config, has any name
    for key in node:
        if OmegaConf.is_dict(node._get_node(key)):
            _open(node[key])


def to_config(composed: DictConfig) -> Config:
    """The plain dataclasses of a composed config. ValueError when an option's own check fails."""
    if composed.run.resume in ("True", "TRUE"):  # ``run.resume=true`` is a bool to YAML, and OmegaConf writes it so
        composed.run.resume = "true"
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def presets(group: str) -> list[str]:
    """What ``group=`` can be: the YAML files of the shipped folder and of the user's."""
    roots = (CONF, Path.cwd() / "conf")
    return sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})


def reject_hidden_presets(folders: list[Path]) -> None:
    """ValueError when a user's file has the name of a shipped preset: Hydra reads the first it finds, which is ours."""
    for folder in folders:
        if folder.resolve() == CONF:
            continue
        for group in GROUPS:
            for file in sorted((folder / group).glob("*.yaml")):
                if (CONF / group / file.name).exists():
                    raise ValueError(
                        f"{os.path.relpath(file)} would never be read: atoll ships {group}={file.stem}; rename the file"
                    )
