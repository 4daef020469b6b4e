"""Every key with its type, default and meaning, read from the dataclasses themselves."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from launch.config import GROUPS, MODELS, Config, presets


@dataclass(frozen=True)
class Key:
    name: str
    type: str
    default: str
    doc: str


def keys() -> dict[str, Key]:
    """Every key by its full name, those of all kinds of models together."""
    found = {key.name: key for key in _keys(Config, "")}
    for options in MODELS.values():
        found |= {key.name: key for key in _keys(options, "model.")}
    return found


def describe() -> str:
    """The presets and keys, as ``atoll train --help`` and ``atoll plan --help`` show them."""
    lines = [
        "atoll train [key=value ...] [preset group=name ...]",
        "atoll plan  [key=value ...] [preset group=name ...]",
        "",
        "Presets (yours: ./conf/<group>/<name>.yaml or --config-dir)",
    ]
    lines += [f"  {group + '=':13}{' '.join(presets(group))}" for group in GROUPS]
    lines += ["", "Keys, their types and what they are where no preset says otherwise"]
    for key in keys().values():
        lines += [f"  {key.name}={key.default}  ({key.type})"] + [f"      {line}" for line in key.doc.splitlines()]
    lines += [
        "",
        "--cfg job shows the composed config, --info where it comes from, --multirun runs a sweep (train.seed=0,1,2).",
    ]
    return "\n".join(lines)


def _keys(options: Any, prefix: str) -> Iterator[Key]:
    hints, docs = get_type_hints(options), _docs(options)
    for item in fields(options):
        hint = hints[item.name]
        if is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{item.name}.")
        else:
            shown = hint.__name__ if type(hint) is type else str(hint).replace("None", "null")
            yield Key(prefix + item.name, shown, _default(item), docs.get(item.name, ""))


def _default(item: "Field[Any]") -> str:
    value = item.default if item.default_factory is MISSING else item.default_factory()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _docs(options: type) -> dict[str, str]:
    """The string under each field, which Python itself drops."""
    docs: dict[str, str] = {}
    for base in reversed([base for base in options.__mro__ if is_dataclass(base)]):
        body = ast.parse(inspect.getsource(base)).body[0].body  # type: ignore[attr-defined]
        for statement, following in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                text = ast.literal_eval(following.value)
                docs[statement.target.id] = inspect.cleandoc(text).replace("``", "")  # type: ignore[union-attr]
    return docs
