"""Relevance at the starts -> Explanation: per input, structured as the inputs are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrpfx.capture import Captured, Inputs, tensors_of
from lrpfx.explanation import Explanation, LayerCalls, LayerRelevance, Layers, stacked
from lrpfx.ops import final, output_leaves
from lrpfx.plan import LEFT_OUT, index_places
from lrpfx.report import Report, with_ledger
from lrpfx.rewrite import Booking
from lrpfx.run.backward import Pulled
from lrpfx.run.targets import Seed

#: By node, or what computes them.
Bookings = Mapping[str, Booking] | Callable[[], Mapping[str, Booking]]


class Gather:
    """Makes explanations out of what the graphs return.

    Args:
        captured: The model.
        module: Its canonized graph.
        starts: See ``starts.find_starts``.
    """

    def __init__(
        self, captured: Captured, module: fx.GraphModule, starts: Mapping[fx.Node, fx.Node]
    ) -> None:
        self._captured, self._graph = captured, module.graph
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        #: Per start the index of its input, and of an embedding where the ids went.
        self._starts = [
            (inputs.index(source), None if start is source else index_places(module, start, source))
            for start, source in starts.items()
        ]

    def output(self, leaves: Sequence[Any]) -> Any:
        """What the graph returns: the model's output, with dicts in the place of dataclasses."""
        spec = self._graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
        return pytree.tree_unflatten(list(leaves), spec)

    def _rebuild(self, leaves: Sequence[Any]) -> Any:
        return self._captured.rebuild(self.output(leaves))

    def finish(self, explained: Sequence[Any]) -> Any:
        """The model's own output from the explained leaves: callables see probabilities."""
        leaves = zip(map(final, output_leaves(self._graph)), explained, strict=True)
        return self._rebuild([f.again(v) if f is not None and f.again else v for f, v in leaves])

    def explanation(
        self,
        inputs: Inputs,
        leaves: Sequence[Any],
        clean: Sequence[Any],
        seed: Seed,
        relevance: Sequence[Tensor | None],
        layers: Layers,
        report: Report,
    ) -> Explanation:
        """What is explained of one target.

        Args:
            inputs: As they were given.
            leaves: The same, flat.
            clean: Output leaves.
            seed: What was pulled back.
            relevance: Per start.
            layers: Of the layers that were asked for.
            report: Of the plan; ``reported`` adds the books.
        """
        by_input, per_feature = self.by_input(leaves, relevance)
        arrived = [r for r in relevance if r is not None]
        seeds = [s for s in seed.seeds if s is not None]
        return Explanation(
            relevance=self.structured(by_input, inputs),
            output=self._rebuild(clean),
            target=seed.classes,
            seed=seeds[0] if len(seeds) == 1 else tuple(seeds),
            absorbed=absorbed_of(seeds, arrived),
            report=report,
            layers=layers,
            embeddings=self.structured(per_feature, inputs)
            if any(r is not None for r in per_feature)
            else None,
            inputs=inputs,
        )

    def structured(self, flat: Sequence[Tensor | None], inputs: Inputs) -> Any:
        """One value per flat input, in the structure of the inputs as they were given."""
        args, kwargs = pytree.tree_unflatten(list(flat), self._captured.signature.spec)
        if isinstance(inputs, Tensor):
            return args[0]
        return {key: kwargs[key] for key in inputs} if isinstance(inputs, Mapping) else tuple(args)

    def by_input(
        self, leaves: Sequence[Any], relevance: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Relevance per flat input, and for token ids that of their embedding per feature.

        The relevance of token ids is their embedding's, summed over features. An id that is looked
        up several times collects it all; so does a floating tensor that holds ids among others.
        """
        found: list[Tensor | None] = [None] * len(leaves)
        per_feature: list[Tensor | None] = [None] * len(leaves)
        for (i, places), r in zip(self._starts, relevance, strict=True):
            if places is None:
                found[i] = _added(found[i], torch.zeros_like(leaves[i]) if r is None else r)
            elif r is not None:
                ids, width = leaves[i], r.shape[-1]
                n = ids.numel()
                own = torch.arange(n, device=ids.device).reshape(ids.shape)
                at, later = (
                    places(*leaves[:i], own + k, *leaves[i + 1 :]).flatten() for k in (0, n)
                )
                # Tokens that the model puts in between are no positions, and belong to nobody.
                at = torch.where(later - at == n, at, n)
                vectors = r.new_zeros(n + 1, width).index_add(0, at, r.reshape(-1, width))
                vectors = vectors[:n].reshape(*ids.shape, width)
                per_feature[i] = _by_feature(per_feature[i], vectors)
                found[i] = _added(found[i], vectors.sum(-1))
        return found, per_feature


def _by_feature(total: Tensor | None, more: Tensor) -> Tensor:
    """The sum over embeddings, or one beside the other if their features are not the same."""
    if total is None or total.shape[-1] == more.shape[-1]:
        return _added(total, more)
    return torch.cat([total, more], -1)


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def reported(
    found: Explanation | list[Explanation],
    bookings: Bookings,
    seed: Seed,
) -> Explanation:
    """The explanation with its own report; several as one.

    Args:
        found: What was explained.
        bookings: None, if no ledger is kept.
        seed: That of the target, of several the first.
    """
    target = seed.description
    if isinstance(found, list):
        found = stacked(found)
    arrived = tensors_of(found.relevance)
    planned = found.report
    if seed.by_gradient:
        planned = replace(planned, notes=tuple(map(_through, planned.notes)))
    report = with_ledger(
        planned,
        bookings,
        target=target,
        started=_total(pytree.tree_leaves(found.seed)),
        reached=_total(arrived),
        notes=seed.notes,
    )
    return replace(found, report=report)


def _through(note: str) -> str:
    """What a callable explains where the function that the model ends in is left out."""
    begun, left_out, _ = note.partition(LEFT_OUT)
    if not left_out:
        return note
    return (
        f"{begun}at the output is read by the target: relevance starts at its logits, as the "
        "gradient of the target through it, times the logits"
    )


def absorbed_of(seeds: Sequence[Tensor], relevance: Sequence[Tensor]) -> Tensor:
    """Seed less relevance per sample, shape (N,); one total where the samples share an input."""
    tensors = [*seeds, *relevance]
    batch = seeds[0].shape[:1]
    per_sample = all(t.shape[:1] == batch for t in tensors) and bool(batch)

    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))

    def total(parts: Sequence[Tensor]) -> Tensor:
        flat = (t.detach().reshape(len(t) if per_sample else 1, -1) for t in parts)
        sums = torch.stack([t.sum(1, dtype=torch.float64) for t in flat]).sum(0)
        return (sums if per_sample else sums[0]).to(dtype)

    return total(seeds) - total(relevance)


def _total(tensors: Sequence[Tensor]) -> float:
    return sum(t.detach().sum(dtype=torch.float64).item() for t in tensors)


class Calls(NamedTuple):
    """How many calls of a module were asked for, and the dimension of its channels, if clear."""

    number: int
    channels: int | None


def by_layer(calls: Mapping[str, Calls], activations: Sequence[Tensor], pulled: Pulled) -> Layers:
    """Per module path its calls, as many as ``calls`` says, in order."""
    entries = iter(map(LayerRelevance, pulled.taps, activations, pulled.passed))
    return Layers(
        (path, LayerCalls.of([next(entries) for _ in range(each.number)], each.channels))
        for path, each in calls.items()
    )
