"""Relevance -> notes of maps that are zero everywhere, and of outputs that are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lrpfx.run.targets import Seed


def blank_notes(seed: Seed, relevance: Sequence[Tensor | None]) -> Iterator[str]:
    """What is noted of samples without any relevance: that there was none, or that none arrived.

    Args:
        seed: What was pulled back.
        relevance: Per start.
    """
    begun = [s.detach() for s in seed.seeds if s is not None]
    arrived = [r.detach() for r in relevance if r is not None]
    n = len(begun[0]) if begun[0].ndim else 0
    by_sample = n > 0 and all(t.ndim and len(t) == n for t in (*begun, *arrived))
    started, reached = (_any(tensors, n if by_sample else 1) for tensors in (begun, arrived))
    if not bool(started.all()):
        yield f"what is explained is zero{_of(~started, by_sample)}, and so is all relevance"
    if bool((started & ~reached).any()):
        yield (
            f"relevance is zero everywhere{_of(started & ~reached, by_sample)}: none of it came to "
            "the inputs; explanation.report.leaks() tells where it stayed"
        )


def _any(tensors: Sequence[Tensor], n: int) -> Tensor:
    """Whether anything is not zero, per sample."""
    found = [t.reshape(n, -1).any(1) for t in tensors if t.numel()]
    return torch.stack(found).any(0) if found else torch.zeros(n, dtype=torch.bool)


def _of(samples: Tensor, by_sample: bool) -> str:
    if not by_sample or len(samples) == 1:
        return ""
    numbers = samples.nonzero().flatten().tolist()
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f" for {len(numbers)} of {len(samples)} samples ({shown})"
