"""seed -> relevance: the ordinary gradient of the phantom stream, for one target or many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrpfx.errors import LrpError, TargetError
from lrpfx.run.targets import Seed

#: What the largest activation may take when targets are pulled back together, times the number of
#: targets; a few tensors of this size exist at once.
BOUND = 2**27


@dataclass(frozen=True)
class Pulled:
    """Relevance of one target, at the starts (None where there is none) and at the taps.

    Args:
        starts: One for each.
        taps: What arrived at each.
        passed: What the masks there let through; the same where there are none.
    """

    starts: list[Tensor | None]
    taps: list[Tensor]
    passed: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All there are."""
        return [*(r for r in self.starts if r is not None), *self.taps]


@dataclass(frozen=True)
class Run:
    """What an instrumented graph returns: see ``rewrite.instrument``."""

    clean: list[Any]
    explained: list[Any]
    phantoms: list[Tensor | None]
    starts: list[Tensor | None]
    taps: list[tuple[Tensor, Tensor, Tensor]]
    masks: list[Tensor]
    gates: list[Tensor]
    begin: list[tuple[Tensor, Tensor]]
    statistics: list[tuple[Tensor, Tensor, int]]

    @property
    def activations(self) -> list[Tensor]:
        """What is asked for of ``layers``."""
        return [activation for activation, *_ in self.taps]

    @property
    def seeded(self) -> list[Any]:
        """What seeds are laid on: the explained outputs, or the place to begin at."""
        return [activation for activation, _ in self.begin] or self.explained

    def pull(
        self,
        seeds: Sequence[Seed],
        *,
        together: int = 1,
        create_graph: bool = False,
        keep: bool = False,
    ) -> Iterator[Pulled]:
        """Pull the seeds back to the starts, one after the other or several at a time.

        Args:
            seeds: One per target, or condition.
            together: How many targets go through the backward pass at a time. What a rule computes
                of the activations is then computed once for all of them.
            create_graph: See ``lrpfx.explain``.
            keep: Whether the run is pulled once more after these.

        Raises:
            TargetError: The outputs in question do not depend on the explained inputs.
        """
        phantoms = [p for _, p in self.begin] or self.phantoms
        arrived = [p for _, p, _ in self.taps]
        passed = [None if own is p else own for _, p, own in self.taps]
        ends = [*phantoms, *self.masks, *self.gates], [*self.starts, *arrived, *passed]
        done = 0
        while done < len(seeds):
            some = seeds[done : done + together]
            done += len(some)
            more = keep or create_graph or done < len(seeds)
            if len(some) > 1:
                try:
                    yield from map(self._sorted, _pull_together(some, *ends))
                    continue
                except LrpError:
                    raise
                except RuntimeError:  # an op, or a stabilizer of the user's, that knows no batches
                    together = 1
            for k, seed in enumerate(some):
                retain = more or k + 1 < len(some)
                yield self._sorted(_pull(seed, *ends, create_graph, retain))

    def _sorted(self, found: Sequence[Tensor | None]) -> Pulled:
        """What was found at the starts, what arrived at the taps, and what passed there."""
        starts, layers = len(self.starts), len(self.taps)
        arrived = [r for r in found[starts : starts + layers] if r is not None]
        behind = found[starts + layers :]
        passed = [a if r is None else r for a, r in zip(arrived, behind, strict=True)]
        return Pulled(list(found[:starts]), arrived, passed)


class Largest:
    """How much memory the largest activation takes, as it was when the graph was captured.

    Args:
        live: The nodes that carry relevance.
        leaves: The inputs that it was captured with, flat.
    """

    def __init__(self, live: Iterable[fx.Node], leaves: Sequence[Any]) -> None:
        self._per_element = max(_bytes(n.meta.get("val")) for n in live) / _elements(leaves)

    def bytes_for(self, leaves: Sequence[Any]) -> float:
        """As many for each element of other inputs."""
        return self._per_element * _elements(leaves)


def _elements(leaves: Sequence[Any]) -> int:
    return sum(t.numel() for t in leaves if isinstance(t, Tensor)) or 1


def _bytes(value: Any) -> int:
    """Of the largest tensor in a node's value, as it was captured."""
    tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    sizes = [math.prod(map(_captured_size, t.shape)) * t.dtype.itemsize for t in tensors]
    return max(sizes, default=1)


def _captured_size(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    return 1 if size.node.hint is None else int(size.node.hint)  # None: it depends on values


def at_a_time(largest: float) -> int:
    """How many targets go through the backward pass together.

    Args:
        largest: Bytes of the largest activation.
    """
    return max(1, int(BOUND // max(largest, 1.0)))


def _pull(
    seed: Seed,
    phantoms: Sequence[Tensor | None],
    ends: Sequence[Tensor | None],
    create_graph: bool,
    keep: bool,
) -> list[Tensor | None]:
    begun, at = _begun(seed, phantoms), [end for end in ends if end is not None]
    grads = torch.autograd.grad(
        [p for p, _ in begun],
        at,
        [s for _, s in begun],
        create_graph=create_graph,
        retain_graph=keep,
        allow_unused=True,
    )
    return _in_place([torch.zeros_like(e) if g is None else g for g, e in _pairs(grads, at)], ends)


def _pull_together(
    seeds: Sequence[Seed],
    phantoms: Sequence[Tensor | None],
    ends: Sequence[Tensor | None],
) -> list[list[Tensor | None]]:
    begun = [_begun(seed, phantoms) for seed in seeds]
    at = [end for end in ends if end is not None]
    grads = torch.autograd.grad(
        [p for p, _ in begun[0]],
        at,
        [torch.stack(column) for column in zip(*([s for _, s in b] for b in begun), strict=True)],
        retain_graph=True,  # also for the one after the other, should this fail
        allow_unused=True,
        is_grads_batched=True,
    )
    return [
        _in_place([torch.zeros_like(e) if g is None else g[k] for g, e in _pairs(grads, at)], ends)
        for k in range(len(seeds))
    ]


def _pairs(
    grads: Sequence[Tensor | None], ends: Sequence[Tensor]
) -> Iterator[tuple[Tensor | None, Tensor]]:
    return zip(grads, ends, strict=True)


def _begun(seed: Seed, phantoms: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    """The phantoms that relevance starts from, each with its seed; and weights of conditions."""
    seeds = [*seed.seeds, *seed.kept]
    pairs = [(p, s) for p, s in zip(phantoms, seeds, strict=True) if s is not None]
    begun = [(p, s) for p, s in pairs if p is not None]
    if len(begun) == len(seed.kept):
        raise TargetError(
            f"{seed.description}: this output does not depend on the explained inputs.",
            fix="choose another output by a callable target.",
        )
    return begun


def _in_place(found: Sequence[Tensor], ends: Sequence[Tensor | None]) -> list[Tensor | None]:
    """One for each of ``ends``, None where there is none."""
    rest = iter(found)
    return [None if end is None else next(rest) for end in ends]
