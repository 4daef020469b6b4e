"""The state of every random generator of this process, as plain values, bytes and tensors."""

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """States of torch on CPU, torch on the current CUDA device (once CUDA is in use), `random` and numpy's global."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": np.asarray(words, dtype="<u4").tobytes(), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": np.asarray(keys, dtype="<u4").tobytes(),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gauss": float(cached_gauss),
        },
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set them all from what `rng_state` returned; the CUDA one where there is a device."""
    python, numpy = state["python"], state["numpy"]
    torch.set_rng_state(state["torch"])
    words = python["words"]
    if isinstance(words, bytes):  # a list in checkpoints of before
        words = np.frombuffer(words, dtype="<u4").tolist()
    random.setstate((python["version"], tuple(words), python["gauss"]))
    keys = np.frombuffer(numpy["keys"], dtype="<u4")
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached_gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
