"""What an explanation returns: plain tensors, a report, a picture, and a way to store them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import TypeVar

from lrpfx.as_shap import as_shap
from lrpfx.capture import opened, tensors_in, tensors_of
from lrpfx.conditions import Channel, Concept
from lrpfx.display import layout, page, titles
from lrpfx.errors import InputError, SelectorError
from lrpfx.heatmap import Clip, Kind, Scale, explained_pairs, heatmap
from lrpfx.report import Report, Row
from lrpfx.text import TokenizerLike, TokenText, token_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


class _Both(NamedTuple):
    relevance: Tensor
    activation: Tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_form(self.relevance)}, sums to {_sum(self.relevance)})"


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

    def mapped(self, change: Callable[[Tensor], Tensor]) -> LayerRelevance:
        """The same with other relevance."""
        return type(self)(change(self.relevance), self.activation, change(self.passed))


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

    def __repr__(self) -> str:
        return ", ".join(map(repr, self)) if len(self) else "not called"


class Layers(dict[str, LayerCalls]):
    """Module paths and the calls of each; shown a line each."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Layers:
        """The same with other relevance."""
        return Layers(
            (path, LayerCalls.of((each.mapped(change) for each in calls), calls.channels))
            for path, calls in self.items()
        )

    def __repr__(self) -> str:
        lines = [f"{path}: {calls!r}" for path, calls in self.items()]
        return "\n".join(lines) if lines else "no layers: ask for them, as in layers=['layer4.*']"


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _sum(tensor: Tensor) -> str:
    return f"{tensor.detach().sum(dtype=torch.float64).item():.4g}"


#: The form of the inputs: a tensor, a sequence or a mapping.
_Form = TypeVar("_Form", default=Any)


@dataclass(frozen=True, repr=False)
class Explanation(Generic[_Form]):
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

    relevance: _Form
    output: Any
    target: Tensor | None
    seed: Tensor | tuple[Tensor, ...]
    absorbed: Tensor
    report: Report
    layers: Layers = field(default_factory=Layers)
    embeddings: Any = None
    inputs: Any = None

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        titles: str | Sequence[str] | None = None,
        kind: Kind | None = None,
        feature_names: Sequence[str] | None = None,
        top: int | None = None,
        sort: bool = True,
        cmap: str | Colormap | None = None,
        clip: Clip = 100.0,
        scale: Scale = "each",
        overlay: bool | float = False,
        columns: int | None = None,
        limit: int | None = None,
        slices: int | Sequence[int] = 8,
        axis: int = 0,
        ax: Axes | None = None,
    ) -> Figure:
        """Draw the relevance beside the input: red positive, blue negative, symmetric scale.

        Args:
            path: Where to write the picture, if anywhere; the ending names the format.
            titles: One per sample; by default what was explained, and its value.
            kind: "image", "volume", "signal", "sequence" or "table"; by default as the shape, and
                the layer that takes the input, tell.
            feature_names: Names of the bars of a table, or of the strips of a signal.
            top: How many bars of a table are drawn, the largest.
            sort: Whether bars are in order of size.
            cmap: A colour map of matplotlib, or its name, or colours such as "00f,fff,f00".
            clip: Percentile of the absolute relevance at which colours end, such as 99, or those
                of the relevance at which either side ends, such as (1, 99).
            scale: "each" sample its own, "shared" by all, or the relevance that has full colour.
            overlay: Draw the map over the image: True, or an opacity; clip=99 shows more of it.
            columns: How many samples side by side.
            limit: How many samples at most: by default 64 images, 8 volumes, 16 of anything else.
            slices: Of a volume, how many slices, or which.
            axis: Of a volume, the dimension that is sliced: 0 is D, 1 is H, 2 is W.
            ax: Axes of your own, for one sample.

        Returns:
            The figure; a notebook shows it. Details are in ``lrpfx.heatmap.heatmap``.

        Raises:
            InputError: Not exactly one explained input can be drawn, or an option does not fit.
        """
        pairs = [pair for pair in self._pairs() if pair[2].is_floating_point()]
        if len(pairs) != 1:
            raise _cannot_draw(self._pairs())
        ((name, relevance, image),) = pairs
        if self._several:
            first = name.removeprefix("inputs")
            raise InputError(
                f"plot() draws one target, and this explanation has {len(relevance)}.",
                fix="draw one of them: lrpfx.heatmap.heatmap("
                f"explanation.relevance{first}[0], inputs=explanation.inputs{first}).",
            )
        return heatmap(
            relevance,
            inputs=image,
            titles=titles if titles is not None else self._titles(len(relevance)),
            path=path,
            kind=kind or layout(self.report.planned().rows, relevance),
            feature_names=feature_names,
            top=top,
            sort=sort,
            cmap=cmap,
            clip=clip,
            scale=scale,
            overlay=overlay,
            columns=columns,
            limit=limit,
            slices=slices,
            axis=axis,
            ax=ax,
        )

    def show_tokens(
        self,
        tokenizer: TokenizerLike,
        *,
        skip_special: bool | Collection[str] = False,
        labels: Sequence[str] | None = None,
        scale: Scale = "each",
    ) -> TokenText:
        """The explained tokens on a red and blue scale: HTML in a notebook, else text.

        Args:
            tokenizer: Something with ``convert_ids_to_tokens``, a function from an id to its token,
                or a vocabulary indexed by id.
            skip_special: Leave out the tokenizer's special tokens, or those named here: they often
                take most of the relevance, and with it all of the colour.
            labels: One per sentence; by default what was explained, and its value.
            scale: What has full colour: the largest relevance of "each" sentence, the largest of
                all ("shared"), or a number.

        Returns:
            What a notebook or terminal shows; ``to_html(path)`` writes it.

        Raises:
            InputError: No input holds token ids that are explained, or several of which the
                tokenizer names none; the explanation is of several targets, or the tokenizer does
                not know an id.
        """
        relevance, ids = self._tokens(tokenizer)
        if self._several:
            raise InputError(
                f"show_tokens() shows one target, and this explanation has {len(relevance)}.",
                fix="show one of them: lrpfx.text.token_text(ids, relevance[k], tokenizer).",
            )
        labels = labels if labels is not None else self._titles(len(ids))
        return token_text(
            ids, relevance, tokenizer, skip_special=skip_special, labels=labels, scale=scale
        )

    def to_shap(
        self,
        *,
        feature_names: Sequence[str] | None = None,
        tokenizer: TokenizerLike | None = None,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
    ) -> Any:
        """The explanation as SHAP has it, for its plots: ``shap.plots.waterfall(e.to_shap()[0])``.

        Base values are what was absorbed (by biases, softmaxes ...), so that with the values they
        sum to what was explained. Images have their channels last; several targets are outputs.

        Args:
            feature_names: Of a table.
            tokenizer: Of token ids, see ``show_tokens``; without it the data are the ids.
            class_names: Of the outputs, such as ``model.config.id2label``; by default "class 3".

        Returns:
            A ``shap.Explanation``; ``output_names`` has what is explained, if that is one class, or
            the same several, for all samples.

        Raises:
            InputError: Not exactly one input is explained, samples share it, or a class has no
                name.
            ImportError: SHAP is not installed.
        """
        given = self.relevance, self.inputs, self.absorbed, self.target
        return as_shap(*given, feature_names, tokenizer, class_names)

    def _tokens(self, tokenizer: TokenizerLike) -> tuple[Tensor, Tensor]:
        """Relevance and ids of the explained tokens.

        Of several inputs that are looked up, as token types are, the tokenizer names its own.
        """
        found = [pair for pair in self._pairs() if not pair[2].is_floating_point()]
        own, *_ = getattr(tokenizer, "model_input_names", ("input_ids",))
        named = [pair for pair in found if pair[0] == f"inputs[{own!r}]"]
        shown = named if len(found) > 1 and named else found
        if len(shown) != 1 or shown[0][2].ndim != 2:
            raise InputError(
                "show_tokens() shows one input of token ids (N, T), and this explanation has "
                f"{len(found)}.",
                where=[f"{name}: {tuple(x.shape)}" for name, _, x in found],
                fix="pair one with lrpfx.text.token_text(ids, relevance, tokenizer)."
                if found
                else "explanation.plot() draws inputs that are no token ids.",
            )
        return shown[0][1:]

    def _pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        return explained_pairs(self.relevance, self.inputs)

    @property
    def _several(self) -> bool:
        """Whether there is a leading dimension of targets."""
        return any(r.ndim > x.ndim for _, r, x in self._pairs())

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
        return titles(self.target, self.seed, n)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tensors and report to one ``.npz`` file that holds no code.

        A path without an ending gets ``.npz``, and ``load`` finds it by either.

        The report is stored with its sums, which are computed if they are not yet; if they cannot
        be any more, as parameters have changed, without, and a note says why. ``output`` and
        ``inputs`` are stored as their tensors only, nested structures as lists.
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
        report = self.report.settled().to_dict()
        arrays["__tree__"] = np.array(json.dumps({"tree": tree, "report": report}))
        with open(_with_ending(path), "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation[Any]:
        """Read what ``save`` wrote; no code in the file is ever run.

        Raises:
            InputError: The file cannot be read, or was not written by ``save``.
        """
        try:
            with open(path if os.path.exists(path) else _with_ending(path), "rb") as file:
                return _restored(file)
        except Exception as error:  # whatever a missing, damaged or hostile file leads to
            if isinstance(error, FileNotFoundError):
                raise InputError(
                    f"there is no file {os.fspath(path)!s}.",
                    fix="give the path that Explanation.save() wrote to.",
                ) from error
            known = zipfile.is_zipfile(path) or isinstance(error, OSError)
            why = f"{type(error).__name__}: {error}" if known else "it is no .npz file"
            raise InputError(
                f"{os.fspath(path)!s} holds no explanation: {why}",
                fix="give a file written by Explanation.save().",
            ) from error

    def __repr__(self) -> str:
        leaves = tensors_of(self.relevance)
        shapes = ", ".join(map(_form, leaves))
        report = self.report
        more = ["sums per op on demand"] if report.pending else []
        if noted := len(report.notes):
            more.append(f"{noted} note{'s' * (noted > 1)}")
        return (
            f"Explanation(relevance {shapes}; target: {report.target}; rules: {report.rules}; "
            f"started {report.started:.6g}, reached the inputs {report.reached:.6g}, "
            f"absorbed {self.absorbed.sum().item():.6g}"
            f"{'; in its report: ' * bool(more)}{', '.join(more)})"
        )

    def _repr_html_(self) -> str:
        named = (
            None if self._several else self._titles(len(self.absorbed) if self.absorbed.ndim else 0)
        )
        return page(self.relevance, self.inputs, self.report, named, self._several)


def _cannot_draw(pairs: Sequence[tuple[str, Tensor, Tensor]]) -> InputError:
    """What is said where not exactly one explained input can be drawn."""
    drawn = [(name, x) for name, _, x in pairs if x.is_floating_point()]
    if not drawn:
        return InputError(
            "plot() draws floating inputs, and this explanation is of token ids.",
            fix="explanation.show_tokens(tokenizer) shows them in colour.",
        )
    first = drawn[0][0].removeprefix("inputs")
    return InputError(
        f"plot() draws one explained input, and this explanation has {len(drawn)}.",
        where=[f"{name}: {tuple(x.shape)}" for name, x in drawn],
        fix="draw each: lrpfx.heatmap.heatmap("
        f"explanation.relevance{first}, inputs=explanation.inputs{first}).",
    )


def stacked(parts: Sequence[Explanation]) -> Explanation:
    """Explanations of the same inputs for several targets as one, targets first."""

    def together(values: Sequence[Any]) -> Any:
        return pytree.tree_map(
            lambda *tensors: torch.stack(tensors) if isinstance(tensors[0], Tensor) else None,
            *map(opened, values),
            is_leaf=lambda value: value is None,
        )

    first = parts[0]
    layers = Layers()
    for path, calls in first.layers.items():
        layers[path] = LayerCalls.of(
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
    names = ("relevance", "target", "seed", "absorbed", "embeddings")
    return replace(
        first, layers=layers, **{n: together([getattr(p, n) for p in parts]) for n in names}
    )


def _with_ending(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path.parent / f"{path.name}.npz" if path.name and not path.suffix else path


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
        layers=Layers(
            (path, LayerCalls.of((LayerRelevance(*c) for c in calls), channels.get(path)))
            for path, calls in layers.items()
        ),
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
