"""Two processes share sequences of uneven parts, activations kept and leaving, and states; prints name, losses and what
the first was told as JSON lines.

With ``auto`` one of them has so little of a device that it takes tiles, and so does the other.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from offload import activations
from offload.options import ActivationOptions, OffloadOptions
from parallel import sequence
from parallel.options import ParallelOptions
from trainer.job import Job
from trainer.loop import Trainer
from trainer.options import DataOptions, LlamaOptions, LoggerOptions, RunOptions, TrainOptions

LEAVING: dict[str, dict[str, Any]] = {
    "keep": {},
    "swap 1": {"mode": "swap", "alpha": 1.0, "keep_last": 0},
    "swap 0": {"mode": "swap", "alpha": 0.0, "keep_last": 1},
    "stream": {"mode": "stream", "tile_tokens": 12},
    "stream_input": {"mode": "stream_input", "tile_tokens": 12},
    "auto": {"mode": "auto", "tile_tokens": 12},
}

AWAY: dict[str, dict[str, Any]] = {
    "states away": {"states": "host", "predict": False},
    "predicted": {"states": "host"},
    "states auto": {"states": "auto", "device_bytes": 7_000_000},
}
"""For more steps, so that the last are compared; over a link that takes its time, so that a step is sending."""
SLOW_S = 0.03


@contextmanager
def slow_link() -> Iterator[None]:
    """Each collective of what shares sequences takes so much longer."""
    sent = sequence._exchange

    def slowly(out: Any, given: Any, *parts: Any) -> None:
        time.sleep(SLOW_S if parts[-1] is not None else 0)
        sent(out, given, *parts)

    sequence._exchange = slowly
    yield
    sequence._exchange = sent


def losses(
    root: str, name: str, world: int, *, steps: int = 3, offload: dict[str, Any] | None = None, **act: Any
) -> tuple[list[float], str]:
    """Of the steps, and of the validations before and after them; and what was told."""
    job = Job(
        model=LlamaOptions(dim=64, ffn_dim=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16),
        data=DataOptions(
            source="text", paths=[f"{root}/text.txt"], valid_paths=[f"{root}/valid.txt"], cache_dir=f"{root}/cache"
        ),
        train=TrainOptions(
            steps=steps, seq_len=31, global_batch_size=4, micro_batch_size=2, eval_sequences=3, sample_tokens=0
        ),
        parallel=ParallelOptions(levels={"gpu": world}, sequence="gpu" if world > 1 else ""),
        offload=OffloadOptions(activations=ActivationOptions(**act), **(offload or {})),
        logger=LoggerOptions(tensorboard=False, plot=False),
        run=RunOptions(root=root, name=name),
    )
    events: list[dict[str, Any]] = []
    Trainer(job, emit=events.append).train()
    found = [event.get("loss", event.get("valid_loss")) for event in events if event["type"] in ("step", "eval")]
    return found, "\n".join(event["text"] for event in events if "text" in event)


def run(rank: int, world: int, root: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=90)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=world, timeout=limit)
    for name, options in LEAVING.items():
        little = {"device_bytes": 1_000_000 if rank else 2**40} if name == "auto" else {}
        found = losses(root, name, world, offload=little, **options)
        if rank == 0:
            print(json.dumps([name, *found]), flush=True)
    for name, offload in AWAY.items():
        with slow_link():
            found = losses(root, name, world, steps=6, offload={"threads": 1, **offload}, mode="recompute")
        if rank == 0:
            print(json.dumps([name, *found]), flush=True)
    activations.spare_bytes = lambda *_: 2**40 if rank else 0  # so one would have all blocks keep, and the other none
    found = losses(root, "uneven", world, steps=6, mode="auto", keep_last=0)
    if rank == 0:
        print(json.dumps(["uneven", *found]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        text = "".join(f"{number} squared is {number * number}.\n" for number in range(3000))
        Path(root, "text.txt").write_text(text)
        Path(root, "valid.txt").write_text(text[::-1])
        torch.set_num_threads(1)
        print(json.dumps(["alone", *losses(root, "alone", 1)]), flush=True)
        torch.multiprocessing.spawn(run, (2, root), nprocs=2)
