"""loop.py"""
import math


def learning_rate(step, steps, peak, warmup_ratio):
    """Linear warm-up over warmup_ratio · steps, then a cosine from peak to 0. step counts from 0."""
    warmup = max(1, round(warmup_ratio * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
