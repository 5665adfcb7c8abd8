"""Relevance of models in float16: scaled on its way, so that it neither vanishes nor overflows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lrpfx.capture import is_finite
from lrpfx.plan import Plan
from lrpfx.rewrite import Ledger
from lrpfx.run.backward import Pulled
from lrpfx.run.targets import Seed

#: What the largest entry of a seed is brought to, the first that overflows nowhere. Spread over
#: 1e5 pixels 32 is 3e-4 for each; the least normal number of float16 is 6e-5. Larger ones would cut
#: off quotients of small denominators.
SIZES = (2.0**5, 2.0**-5)
#: What the largest quotient of a seed and the output that it is laid on is brought to at most: what
#: the rules make of quotients is cut off beyond 65504.
_QUOTIENT = 2.0**12


class Pulls(Protocol):
    """A forward pass that can be pulled back, see ``backward.Run``."""

    @property
    def seeded(self) -> Sequence[Any]:
        """What seeds are laid on."""

    def pull(
        self, seeds: Sequence[Seed], *, together: int, create_graph: bool, keep: bool
    ) -> Iterator[Pulled]:
        """Pull the seeds back to the starts."""


def in_float16(plan: Plan, leaves: Iterable[Any]) -> bool:
    """Whether any part of a model computes in float16, by itself or under autocast."""
    if any(a.record.dtype == torch.float16 for a in plan.assignments.values()):
        return True
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    return any(
        torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) == torch.float16
        for d in devices
    )


def pull_scaled(
    run: Pulls,
    seeds: Sequence[Seed],
    *,
    book: Ledger | None = None,
    together: int = 1,
    create_graph: bool = False,
) -> Iterator[Pulled]:
    """Pull seeds back through float16: relevance is linear in them, and so of any scale.

    Rules that look at the sign of relevance keep positive factors, too. Factors are powers of two,
    which round nothing.

    Args:
        run: The forward pass.
        seeds: One per target, or condition.
        book: The ledger of the run, which has one seed then.
        together: See ``Run.pull``.
        create_graph: See ``lrpfx.explain``.

    Returns:
        Relevance in float32 where it was in float16: some of it would vanish there.
    """
    for first in range(0, len(seeds), together):
        some = seeds[first : first + together]
        for size in SIZES:
            units = [unit_of(seed, run.seeded, size).item() for seed in some]
            if book is not None:
                book.start(units[0])
            scaled = [_times(seed, unit) for seed, unit in zip(some, units, strict=True)]
            pulled = run.pull(scaled, together=together, create_graph=create_graph, keep=True)
            found = [_unscaled(each, unit) for each, unit in zip(pulled, units, strict=True)]
            if all(is_finite(t) for each in found for t in each.tensors):
                break
        yield from found


def unit_of(seed: Seed, begun: Sequence[Any], size: float) -> Tensor:
    """The power of two that brings the largest entry of a seed to a size, or to less.

    Args:
        seed: The seed.
        begun: What it is laid on.
        size: One of ``SIZES``; the last of them is reached in any case.
    """
    pairs = [
        (s.detach().float(), z.detach().float())
        for s, z in zip(seed.seeds, begun, strict=True)
        if s is not None and s.numel()
    ]
    if not pairs:
        return torch.ones(())
    largest = _largest([s for s, _ in pairs])
    quotient = _largest([torch.where(z == 0, torch.zeros_like(z), s / z) for s, z in pairs])
    most = torch.maximum(_QUOTIENT / quotient, SIZES[-1] / largest)
    unit = torch.exp2(torch.floor(torch.log2(torch.minimum(size / largest, most))))
    usual = unit.isfinite() & (unit > 0)
    return torch.where(usual, unit, torch.ones_like(unit))


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.abs().flatten().amax(0) for t in tensors]).amax(0)


def _times(seed: Seed, unit: float) -> Seed:
    return replace(seed, seeds=[None if s is None else s * unit for s in seed.seeds])


def _unscaled(pulled: Pulled, unit: float) -> Pulled:
    def back(r: Tensor) -> Tensor:
        return (r.float() if r.dtype == torch.float16 else r) / unit

    return Pulled(
        [None if r is None else back(r) for r in pulled.starts],
        [back(r) for r in pulled.taps],
        [back(r) for r in pulled.passed],
    )
