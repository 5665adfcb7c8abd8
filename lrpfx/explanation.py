"""What an explanation returns: plain tensors, a report, a picture, and a way to store them."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.capture import tensors_in
from lrpfx.conditions import Channel, Concept
from lrpfx.errors import InputError, SelectorError
from lrpfx.report import Report, Row
from lrpfx.text import Tokenizer, TokenText, token_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Both(NamedTuple):
    relevance: Tensor
    activation: Tensor


class LayerRelevance(_Both):
    """Relevance and activation at the output of one call of a module, shaped alike.

    Args:
        relevance: What arrived.
        activation: The output.
        passed: What the masks of conditions let through; None if there were none.
    """

    passed: Tensor

    def __new__(
        cls, relevance: Tensor, activation: Tensor, passed: Tensor | None = None
    ) -> LayerRelevance:
        """A pair, and what passed."""
        both = super().__new__(cls, relevance, activation)
        both.passed = relevance if passed is None else passed
        return both


class LayerCalls(tuple[LayerRelevance, ...]):
    """One ``LayerRelevance`` per call of a module; a module called once can be read directly."""

    #: The dimension of the channels of one output, None where it is not clear.
    channels: int | None = None

    @classmethod
    def of(cls, calls: Iterable[LayerRelevance], channels: int | None) -> LayerCalls:
        """The calls of a module whose channels are in a known dimension."""
        made = cls(calls)
        made.channels = channels
        return made

    @property
    def relevance(self) -> Tensor:
        """Relevance at the output of the only call: what arrived, before any mask."""
        return self._only().relevance

    @property
    def passed(self) -> Tensor:
        """Relevance that the masks of conditions let through, at the only call."""
        return self._only().passed

    @property
    def activation(self) -> Tensor:
        """Activation at the output of the only call."""
        return self._only().activation

    def _only(self) -> LayerRelevance:
        if len(self) != 1:
            raise SelectorError(
                f"this module is called {len(self)} times.",
                fix="pick a call by its number, such as layers[path][0].relevance.",
            )
        return self[0]


@dataclass(frozen=True, repr=False)
class Explanation:
    """The relevance of a model's inputs for its output.

    Args:
        relevance: Structured like the inputs: a tensor shaped like each explained input, None
            for what is not explained. Per sample it sums to the seed, less ``absorbed``.
        output: What the model returned.
        target: The explained class per sample, shape (N,), None where the target is no class.
        seed: Relevance of the output that the backward pass started from, shaped like it; a tuple
            where a callable target read several of the outputs.
        absorbed: Relevance that did not reach the inputs, per sample, shape (N,); one total where
            the samples share an input.
        layers: Per requested module path, relevance and activation of its calls.
        embeddings: Structured like the inputs: for token ids their relevance per embedding feature
            (N, T, D), else None; None as a whole if there are no token ids. Of several embeddings
            their sum, or where they have different widths one beside the other.
        report: Which rule each node got and why, and what became of the relevance.
        inputs: What was explained, for the picture.
    """

    relevance: Any
    output: Any
    target: Tensor | None
    seed: Tensor | tuple[Tensor, ...]
    absorbed: Tensor
    report: Report
    layers: Mapping[str, LayerCalls] = field(default_factory=dict)
    embeddings: Any = None
    inputs: Any = None

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Figure:
        """Draw the relevance beside the input: red positive, blue negative, symmetric scale.

        Args:
            path: Where to write the picture, if anywhere; the ending names the format.
            **options: Passed to ``lrpfx.heatmap.heatmap``.

        Raises:
            ValueError: The explained input has no shape that can be drawn.
        """
        from lrpfx.heatmap import heatmap

        pairs = zip(
            pytree.tree_leaves(self.relevance), pytree.tree_leaves(self.inputs), strict=True
        )
        drawn = [
            (r, x)
            for r, x in pairs
            if isinstance(r, Tensor) and r.ndim > 1 and x.is_floating_point()
        ]
        if len(drawn) != 1:
            raise InputError(
                f"plot() draws one explained input, and this explanation has {len(drawn)}.",
                fix="draw each with lrpfx.heatmap.heatmap(relevance, images=input).",
            )
        relevance, image = drawn[0]
        options.setdefault("titles", self._titles(len(relevance)))
        return heatmap(relevance.detach(), images=image.detach(), path=path, **options)

    def show_tokens(self, tokenizer: Tokenizer | Callable[[int], str] | Sequence[str]) -> TokenText:
        """The explained tokens on a red and blue scale: HTML in a notebook, else coloured text.

        Args:
            tokenizer: Something with ``convert_ids_to_tokens``, a function from an id to its token,
                or a vocabulary indexed by id.

        Raises:
            InputError: Not exactly one input holds token ids that are explained, the explanation
                is of several targets, or the tokenizer does not know an id.
        """
        pairs = zip(
            pytree.tree_leaves(self.relevance), pytree.tree_leaves(self.inputs), strict=True
        )
        explained = [
            (r, x)
            for r, x in pairs
            if isinstance(r, Tensor) and isinstance(x, Tensor) and not x.is_floating_point()
        ]
        if len(explained) != 1 or explained[0][1].ndim != 2:
            raise InputError(
                f"show_tokens() shows one input of token ids (N, T), and this explanation has "
                f"{[tuple(x.shape) for _, x in explained]}.",
                fix="pair them with lrpfx.text.token_text(ids, relevance, tokenizer).",
            )
        relevance, ids = explained[0]
        if relevance.ndim > ids.ndim:
            raise InputError(
                f"show_tokens() shows one target, and this explanation has {len(relevance)}.",
                fix="show one of them: lrpfx.text.token_text(ids, relevance[k], tokenizer).",
            )
        return token_text(ids, relevance, tokenizer)

    def concepts(self, layer: str, kind: Concept | None = None) -> Tensor:
        """Relevance of each concept at a layer, summed over positions.

        Args:
            layer: One of ``layers=``, or a conditioned place.
            kind: The kind of concept; channels by default.

        Returns:
            Shape (N, C), with a dimension of targets or conditions before it if there are several.
            It sums over concepts to the layer's relevance.

        Raises:
            SelectorError: The layer was not asked for, or has no such concepts.
        """
        if layer not in self.layers:
            raise SelectorError(
                f"this explanation has no layer {layer!r}.",
                fix=f"ask for it: layers=[{layer!r}]; there are {sorted(self.layers)}.",
            )
        calls = self.layers[layer]
        relevance, activation = calls.relevance, calls.activation
        try:
            placed = (Channel() if kind is None else kind).at(activation.shape, calls.channels)
        except ValueError as error:
            raise SelectorError(f"{layer}: {error}.", fix="give another kind=.") from error
        if relevance.ndim == activation.ndim:
            return placed.encode(relevance, activation)
        return torch.stack([placed.encode(r, activation) for r in relevance])

    def _titles(self, n: int) -> list[str] | None:
        seeds = [seed.detach() for seed in pytree.tree_leaves(self.seed)]
        if any(seed.ndim == 0 or len(seed) != n for seed in seeds):
            return None
        sums = torch.stack([seed.reshape(n, -1).sum(1) for seed in seeds]).sum(0).tolist()
        if self.target is None:
            return [f"{value:.3g}" for value in sums]
        return [f"class {c}: {v:.3g}" for c, v in zip(self.target.tolist(), sums, strict=True)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tensors and report to one ``.npz`` file that holds no code.

        ``output`` and ``inputs`` are stored as their tensors only, nested structures as lists.
        """
        arrays: dict[str, Any] = {}

        def store(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                # npz has no bfloat16; float32 holds each of its values exactly.
                plain = value.detach().cpu()
                while name in arrays:  # keys of dicts may hold dots themselves
                    name += "_"
                arrays[name] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
                return {"tensor": name, "dtype": str(value.dtype).removeprefix("torch.")}
            if isinstance(value, Mapping):
                return {"dict": [[str(k), store(f"{name}.{k}", v)] for k, v in value.items()]}
            if isinstance(value, (tuple, list)):
                kind = "list" if isinstance(value, list) else "tuple"
                return {kind: [store(f"{name}.{i}", v) for i, v in enumerate(value)]}
            if value is None or isinstance(value, (int, float, str, bool)):
                return {"value": value}
            return store(name, tensors_in(value))

        names = ("relevance", "output", "target", "seed", "absorbed", "embeddings", "inputs")
        tree = {name: store(name, getattr(self, name)) for name in names}
        layers = {p: [[*c, c.passed] for c in v] for p, v in self.layers.items()}
        tree["layers"] = store("layers", layers)
        tree["channels"] = store("channels", {p: v.channels for p, v in self.layers.items()})
        arrays["__tree__"] = np.array(json.dumps({"tree": tree, "report": self.report.to_dict()}))
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Read what ``save`` wrote; no code in the file is ever run.

        Raises:
            InputError: The file cannot be read, or was not written by ``save``.
        """
        try:
            with open(path, "rb") as file:
                return _restored(file)
        except Exception as error:  # whatever a missing, damaged or hostile file leads to
            raise InputError(
                f"{os.fspath(path)!s} holds no explanation: {type(error).__name__}: {error}",
                fix="give a file written by Explanation.save().",
            ) from error

    def __repr__(self) -> str:
        leaves = [t for t in pytree.tree_leaves(self.relevance) if isinstance(t, Tensor)]
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in leaves)
        report = self.report
        return (
            f"Explanation(relevance {shapes}; target: {report.target}; rules: {report.rules}; "
            f"started {report.started:.6g}, reached the inputs {report.reached:.6g}, "
            f"absorbed {self.absorbed.sum().item():.6g})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.report._repr_html_()}"


def stacked(parts: Sequence[Explanation]) -> Explanation:
    """Explanations of the same inputs for several targets as one, targets first."""

    def together(values: Sequence[Any]) -> Any:
        return pytree.tree_map(
            lambda *tensors: torch.stack(tensors) if isinstance(tensors[0], Tensor) else None,
            *values,
            is_leaf=lambda value: value is None,
        )

    first = parts[0]
    layers = {
        path: LayerCalls.of(
            (
                LayerRelevance(
                    torch.stack([p.layers[path][i].relevance for p in parts]),
                    c.activation,
                    torch.stack([p.layers[path][i].passed for p in parts]),
                )
                for i, c in enumerate(calls)
            ),
            calls.channels,
        )
        for path, calls in first.layers.items()
    }
    names = ("relevance", "target", "seed", "absorbed", "embeddings")
    return replace(
        first, layers=layers, **{n: together([getattr(p, n) for p in parts]) for n in names}
    )


def _restored(file: BinaryIO) -> Explanation:
    with np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    written = json.loads(str(arrays["__tree__"]))

    def restore(node: dict[str, Any]) -> Any:
        ((kind, value),) = [(k, v) for k, v in node.items() if k != "dtype"]
        if kind == "tensor":
            dtype = getattr(torch, node["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"{node['dtype']!r} is no dtype")
            return torch.from_numpy(np.asarray(arrays[value])).to(dtype)
        if kind == "dict":
            return {k: restore(v) for k, v in value}
        if kind in ("list", "tuple"):
            return [restore(v) for v in value] if kind == "list" else tuple(map(restore, value))
        if kind == "value":
            return value
        raise KeyError(kind)

    values = {name: restore(node) for name, node in written["tree"].items()}
    layers, channels = values.pop("layers"), values.pop("channels", {})
    return Explanation(
        **values,
        layers={
            path: LayerCalls.of((LayerRelevance(*c) for c in calls), channels.get(path))
            for path, calls in layers.items()
        },
        report=_report_from(written["report"]),
    )


def _report_from(stored: dict[str, Any]) -> Report:
    ledger = stored["ledger"] or {}
    rows = tuple(
        Row(
            **{
                **row,
                "shape": tuple(row["shape"]),
                "folded": tuple(row["folded"]),
                "inputs": tuple(row.get("inputs", ())),  # version 0.1.0 did not store them
                "edge": row.get("edge", ""),
            }
        )
        for row in stored["rows"]
    )
    return Report(
        rows=rows,
        rules=stored["rules"],
        constant_nodes=stored["coverage"]["constant_nodes"],
        notes=tuple(stored["notes"]),
        target=stored["target"],
        started=ledger.get("started"),
        reached=ledger.get("reached"),
    )
