"""What a process does once, before the first step has to wait for it: imports behind imports, autograd, libraries."""

import torch

from trainer.build import Rank, build_engine
from trainer.job import Job
from trainer.models import build_model
from trainer.options import LlamaOptions

VOCABULARY, TOKENS = 16, 8


def warm_up(*, backward: bool) -> None:
    """One step of a model of nothing, on the CPU: seconds the first time in a process. Touches no group, and leaves the
    random generators as they were.

    backward: autograd's first one counts the GPUs, and with that CUDA settles which ones this process sees. Where a
    process is told its GPU later it must not be.
    """
    state = torch.get_rng_state()
    job = Job(model=LlamaOptions(dim=16, num_heads=2, ffn_dim=16, num_layers=1, compile=False))
    cpu, dtype = torch.device("cpu"), torch.float32
    model = build_model(job.model, vocab_size=VOCABULARY, seq_len=TOKENS, dtype=dtype, device=cpu)
    engine = build_engine(job, model, Rank(0, 1, cpu), dtype)
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
    engine.expect(0.0)
    if backward:
        engine.forward_backward(tokens, tokens, 0, scale=1.0, first=True, last=True)
        engine.step(0.0, 1.0)
    else:
        engine.evaluate(tokens, tokens, 0)
    engine.close()
    torch.set_rng_state(state)
