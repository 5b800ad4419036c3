"""What a processor computes itself, and what it only imitates."""

import torch


def cpu_has_bf16() -> bool:
    """Say whether this machine's processor multiplies bf16 itself."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def in_words(precision: str, faster: str, *, gpus: bool) -> str:
    """Return the name of an arithmetic, with a warning where this machine only imitates it.

    Args:
        precision: As in a verb's `--precision`.
        faster: What to choose then.
        gpus: Whether GPUs compute it.
    """
    if precision == "bf16" and not gpus and not cpu_has_bf16():
        return f"bf16, which this processor only imitates: {faster} is many times as fast here"
    return precision
