"""What a line of ``metrics.jsonl`` says of a step."""

import time
from typing import Any

from offload.device import DeviceReader, peak_flops
from trainer.build import Rank, choose_dtype
from trainer.job import Job
from trainer.models import LanguageModel
from trainer.running import Running


class Meter:
    """Tokens, FLOP/s and readings of the device, for the steps of one rank. `close` it at the end."""

    def __init__(self, job: Job, model: LanguageModel, where: Rank) -> None:
        self._step_tokens = job.train.global_batch_size * job.train.seq_len
        self._step_flops = model.flops_per_token(job.train.seq_len) * self._step_tokens
        peak = peak_flops(where.device, choose_dtype(job.train.dtype, where.device)[0])
        self._peak_flops = peak * where.world if peak else None
        self._device = DeviceReader(where.device)

    def read(self, done: Running, step_s: float, loss: float, grad_norm: float) -> dict[str, Any]:
        """The metrics of a step that has just ended; ``mfu`` is None where the device's peak is not known."""
        flops_per_s = self._step_flops / step_s
        return {
            "step": done.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": done.lr,
            "tokens": (done.step + 1) * self._step_tokens,
            "tokens_per_s": self._step_tokens / step_s,
            "step_s": step_s,
            "time": time.time(),
            "flops_per_s": flops_per_s,
            "mfu": flops_per_s / self._peak_flops if self._peak_flops else None,
            **self._device.read(),
            **({"skipped": done.fault} if done.fault else {}),
        }

    def close(self) -> None:
        self._device.close()
