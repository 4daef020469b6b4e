"""Which kernel computes attention.

`torch.nn.functional.scaled_dot_product_attention` picks one by rules that do not know how fast each is on the device at
hand. On Hopper cuDNN's causal attention is 1.6 to 1.8 times as fast as the flash kernel that it would pick.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention_backends(device: torch.device, *, lengths_vary: bool = False) -> AbstractContextManager[None]:
    """A context in which attention runs on the fastest kernel that `device` has.

    Entered once, around training: blocks that are compiled inside it keep the choice, and leaving it between steps
    would compile them again. Hopper and later: cuDNN, then flash; elsewhere PyTorch's own order (flash on CPU).
    lengths_vary: from step to step. cuDNN makes a kernel for each length that is new; then flash first everywhere.
    """
    if lengths_vary and device.type == "cuda":
        return sdpa_kernel(_CUDNN_FIRST[1:], set_priority=True)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return sdpa_kernel(_CUDNN_FIRST, set_priority=True)
    return nullcontext()
