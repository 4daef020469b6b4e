"""Text out of a model: one token at a time, without a cache of keys and values."""

import torch


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompt_tokens: list[int],
    count: int,
    *,
    seq_len: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """`count` tokens that follow the prompt, each drawn from the model at `temperature` (0: the likeliest).

    The model sees the last `seq_len` tokens. Its calls are collective where it is sharded, so every rank calls this
    alike; each draws the same tokens, the draw being a function of `seed` alone, on the CPU.
    """
    if not prompt_tokens:
        raise ValueError("generate needs at least one prompt token")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt_tokens)
    for _ in range(count):
        window = torch.tensor([tokens[-seq_len:]], device=device)
        logits = model(window)[0].float().cpu()
        tokens.append(_draw(logits, temperature, generator))
    return tokens[len(prompt_tokens) :]


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
