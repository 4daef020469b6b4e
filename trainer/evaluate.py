"""Validation, and a sample of what the model writes. Collective: every rank calls them alike."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from parallel.engine import Engine
from parallel.sequence import SequenceParallel
from trainer.build import Rank
from trainer.data import Corpus
from trainer.models.generate import generate
from trainer.models.loss import IGNORED

PROMPT = "def "


def validate(
    engine: Engine,
    corpus: Corpus,
    where: Rank,
    sequence: SequenceParallel,
    *,
    num_sequences: int,
    batch_size: int,
    go_on: Callable[[], bool],
) -> float | None:
    """Mean loss in nats a token over the first `num_sequences` of the validation split; None where there is none, or
    where `go_on`, which is asked before each batch and answers alike on all ranks, says no.

    The same sequences on any number of ranks. Every rank runs as many batches as the others, of one size (so nothing is
    compiled again): where sequences run out their targets are ignored.
    """
    split = corpus.valid
    if split is None or num_sequences == 0:
        return None
    total = min(num_sequences, split.num_sequences)
    loss, stride = torch.zeros((), device=where.device), sequence.count * batch_size
    for start in range(sequence.number * batch_size, -(-total // stride) * stride, stride):
        if not go_on():
            return None
        stop = min(start + batch_size, total)
        first = max(0, min(start, split.num_sequences - batch_size))
        rows = split.sequential(first, min(batch_size, split.num_sequences))
        number = torch.arange(first, first + len(rows))
        targets = rows[:, 1:].masked_fill(((number < start) | (number >= stop)).unsqueeze(1), IGNORED)
        tokens, seq_len = rows[:, :-1], targets.size(1)
        part = sequence.part(seq_len)
        with sequence.attention(seq_len):
            mean = engine.evaluate(tokens[:, part].to(where.device), targets[:, part].to(where.device), part.start)
        loss += mean * sequence.share(seq_len) * max(0, stop - start)
    if where.world > 1:
        dist.all_reduce(loss)
    return (loss / total).item()


def sample(engine: Engine, corpus: Corpus, *, count: int, seq_len: int, seed: int) -> str:
    """A prompt and the `count` tokens that the model goes on with."""
    prompt = corpus.encode(PROMPT)
    with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
        tokens = generate(engine.model, prompt, count, seq_len=seq_len, temperature=0.8, seed=seed)
    return corpus.decode(prompt + tokens)
