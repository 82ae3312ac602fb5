"""The learning-rate schedule: linear warm-up, then half a cosine."""

import math


def cosine_with_warmup(step: int, warmup_steps: int, total_steps: int, floor: float) -> float:
    """The factor of the learning rate at a step, counted from 0: it rises to 1, then falls to `floor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
