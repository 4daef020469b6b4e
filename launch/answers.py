"""What the command line answers to a wrong flag, key, value or preset: the one that was meant."""

from difflib import SequenceMatcher, get_close_matches
from itertools import pairwise

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from launch.config import GROUPS, MODELS, presets
from launch.keys import Key, keys

FLAGS = {
    *("--help", "-h", "--hydra-help", "--version", "--run", "-r", "--multirun", "-m", "--cfg", "-c", "--resolve"),
    *("--package", "-p", "--info", "-i", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--shell-completion", "-sc"),
}
"""Hydra's own."""
WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}

WORDS = {
    "train.steps": ("max_steps", "num_steps", "iterations", "max_iters", "total_steps"),
    "train.global_batch_size": ("batch_size", "global_batch", "train_batch_size"),
    "train.micro_batch_size": ("micro_batch", "per_device_train_batch_size", "device_batch_size"),
    "train.seq_len": (
        "sequence_length",
        "seq_length",
        "max_length",
        "max_seq_len",
        "block_size",
        "context_length",
        "context",
    ),
    "train.clip_norm": ("grad_clip", "max_grad_norm", "gradient_clipping", "max_norm"),
    "train.dtype": ("precision", "bf16", "fp16"),
    "optimizer.lr": ("learning_rate", "max_lr"),
    "optimizer.weight_decay": ("wd",),
    "optimizer.warmup_steps": ("warmup", "num_warmup_steps"),
    "launch.workers": ("world_size", "num_workers", "nproc_per_node", "gpus", "num_gpus"),
    "launch.nodes": ("nnodes", "num_nodes"),
    "parallel.placement": ("strategy", "zero_stage", "sharding_strategy"),
    "data.paths": ("files", "data_path", "dataset"),
    "model.dim": ("hidden_size", "d_model", "n_embd"),
    "model.num_layers": ("num_hidden_layers", "n_layer", "layers"),
    "model.num_heads": ("num_attention_heads", "n_head", "heads"),
    "model.num_kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "run.root": ("output_dir", "out_dir", "output"),
    "checkpoint.every_steps": ("save_steps", "save_interval", "checkpoint_interval"),
}
"""What other frameworks call our keys."""


SHORT = {"offload.activations": "offload.activations.mode"}
"""Sections that a single word may set, and the key that it is for."""


def spell_out(args: list[str]) -> list[str]:
    """``offload.activations.mode=swap`` where ``offload.activations=swap`` was typed."""
    pairs = [arg.partition("=") for arg in args]
    return [
        f"{SHORT.get(key, key)}={value}" if sign and not value.startswith("{") else key + sign + value
        for key, sign, value in pairs
    ]


def reject_flags(args: list[str]) -> None:
    """ValueError for ``--steps 5``, which Hydra's parser would answer with its own usage."""
    for place, arg in enumerate(args):
        flag, given, value = arg.partition("=")
        if arg == "-" or not arg.startswith("-") or flag in FLAGS:
            continue
        if not given and place + 1 < len(args) and not args[place + 1].startswith("-") and "=" not in args[place + 1]:
            value = args[place + 1]
        name = flag.lstrip("-").replace("-", "_")
        raise ValueError(f"there is no option {flag}; {_meant(name, value)}")


def flags_first(args: list[str]) -> list[str]:
    """Flags, each with its value, before the overrides: Hydra's parser reads them in no other order."""
    flags: list[str] = []
    overrides: list[str] = []
    for previous, arg in pairwise(["", *args]):
        (flags if arg.startswith("-") or previous in WITH_VALUE else overrides).append(arg)
    return flags + overrides


def reject_additions(composed: DictConfig, prefix: str = "") -> None:
    """ValueError for a key that ``+key=value`` has added, which nothing would read."""
    known = keys()
    for key in map(str, composed):
        name = f"{prefix}{key}"
        if name not in known and not any(other.startswith(f"{name}.") for other in known):
            raise ValueError(f"there is no key {name}; {_meant(name, '')}")
        if name not in known and OmegaConf.is_dict(composed[key]):
            reject_additions(composed[key], f"{name}.")


def explain(error: Exception, overrides: list[str]) -> str | None:
    """One sentence for what Hydra or OmegaConf refused; None when `error` is neither's."""
    if isinstance(error, MissingConfigException):
        return _explain_preset(error)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return _explain_key(cause, overrides)
    if isinstance(error, OverrideParseException):
        return _explain_syntax(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return " ".join(str(error).split("\nSee http")[0].replace("\\", "").split())
    return None


def _explain_preset(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return f"there is no config {name!r} in conf/, ./conf or --config-dir"
    choices = [choice for choice in error.options or [] if choice not in MODELS]
    if not choices:
        return f"there is no group {group!r}; the groups are {', '.join(GROUPS)}"
    return (
        f"{group}={name}: choose one of {', '.join(choices)}{_nearest(name, choices, f'; did you mean {group}={{}}?')}"
    )


def _explain_key(cause: OmegaConfBaseException, overrides: list[str]) -> str:
    name = str(cause.full_key)
    below = next((o for o in overrides if o.lstrip("+~").startswith(f"{name}.")), None)
    given = below or next((o for o in overrides if o.lstrip("+~").startswith(f"{name}=")), None)
    typed, _, value = (given or name).lstrip("+~").partition("=")
    known = keys()
    if below and name in known and not known[name].type.startswith("dict"):
        return f"{below}: {name} is one value ({known[name].type}), there are no keys below it"
    key = known.get(name) or known.get(name.rpartition(".")[0])  # of an entry of a mapping, parallel.levels.node
    if key and (isinstance(cause, ValidationError) or key.type.startswith("dict")):
        received = f"received {value!r}" if given else str(cause.msg).splitlines()[0]
        return f"{given or name}: {received}, wanted {key.type}{_example(key, value)}"
    if name in known:
        return f"{name} is no key of the {name.partition('.')[0]} that was chosen, or cannot be changed this way"
    if name in GROUPS or any(key.startswith(f"{name}.") for key in known):
        return _explain_section(name, value)
    return f"there is no key {typed}; {_meant(typed, value)}"


def _explain_section(name: str, value: str) -> str:
    choices = presets(name)
    inside = ", ".join(key for key in keys() if key.startswith(f"{name}."))
    chosen = f"{name}={value}: choose one of {', '.join(choices)}; " if choices else ""
    return f"{chosen}{name} is a section, whose keys are {inside}"


def _explain_syntax(error: OverrideParseException) -> str:
    given = str(error.override)
    if "=" not in given:
        return f"{given!r}: write key=value; {_meant(given, '')}"
    why = str(error.message).splitlines()[0]
    return f"{given!r} cannot be read ({why}); quote values with special characters: 'key=\"a,b\"'"


def _example(key: Key, value: str) -> str:
    if key.type.startswith("dict"):
        return f"; write '{key.name}={{name: value}}'"
    return f"; write '{key.name}=[{value}]'" if key.type.startswith("list") and value else ""


def _meant(name: str, value: str) -> str:
    """``write train.steps=5`` for the key that `name` resembles."""
    key = _closest_key(name)
    if key is None:
        return "atoll train --help lists all keys"
    return f"did you mean {key}={value or '…'}?"


def _closest_key(name: str) -> str | None:
    section, _, last = name.lower().rpartition(".")

    def score(key: str) -> float:
        own_section, _, own = key.rpartition(".")
        same_section = 0.2 if section and own_section == section else 0.0
        return same_section + max(SequenceMatcher(None, last, word).ratio() for word in (own, *WORDS.get(key, ())))

    best = max([*keys(), *GROUPS], key=lambda key: (score(key), -len(key)))
    return best if score(best) >= 0.7 else None


def _nearest(name: str, choices: list[str], text: str) -> str:
    found = get_close_matches(name.lower(), choices, n=1, cutoff=0.5)
    return text.format(found[0]) if found else ""
