"""An explanation -> which concepts handed relevance to which: a graph over layers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lrpfx.conditions import Channel, Concept
from lrpfx.errors import InputError, SelectorError
from lrpfx.explain import Explainer
from lrpfx.run import Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ConceptNode:
    """A concept of a layer, and the relevance that came to it through the graph.

    Args:
        layer: The layer's name.
        concept: Its number there.
        relevance: Summed over positions and samples.
    """

    layer: str
    concept: int
    relevance: float

    @property
    def key(self) -> tuple[str, int]:
        """Layer and number."""
        return self.layer, self.concept


@dataclass(frozen=True)
class ConceptEdge:
    """What one concept handed to another, through no other layer of the graph.

    Args:
        source: Layer and number of the concept that had the relevance.
        target: Of the one below that got it.
        relevance: How much, summed over positions and samples.
        share: The same as a share of the source's relevance; None if that is zero.
    """

    source: tuple[str, int]
    target: tuple[str, int]
    relevance: float
    share: float | None


@dataclass(frozen=True, repr=False)
class AttributionGraph:
    """Concepts of several layers, and the relevance that goes from one to another.

    The shares of all edges from a concept sum to at most what it hands on: the rest went to
    concepts that are not shown, around the layers, or was absorbed.

    Args:
        layers: From the inputs to the output.
        nodes: From the output to the inputs, by layer the most relevant first.
        edges: In the order of their sources.
        target: What was explained.

    Source: Achtibat et al. 2023 (CRP), https://doi.org/10.1038/s42256-023-00711-8, fig. 5.
    """

    layers: tuple[str, ...]
    nodes: tuple[ConceptNode, ...]
    edges: tuple[ConceptEdge, ...]
    target: str

    def at(self, layer: str) -> tuple[ConceptNode, ...]:
        """The concepts of one layer."""
        return tuple(node for node in self.nodes if node.layer == layer)

    def to_dict(self) -> dict[str, Any]:
        """The graph as plain dicts, lists, strings and numbers."""
        return {
            "layers": list(self.layers),
            "target": self.target,
            "nodes": [vars(node) for node in self.nodes],
            "edges": [
                {**vars(e), "source": list(e.source), "target": list(e.target)} for e in self.edges
            ],
        }

    def to_networkx(self) -> Any:
        """A ``networkx.DiGraph`` with (layer, concept) as nodes.

        Raises:
            InputError: networkx is not installed.
        """
        try:
            import networkx
        except ImportError as error:
            raise InputError(
                "to_networkx() needs networkx.", fix="pip install 'lrpfx[concepts]'."
            ) from error
        graph = networkx.DiGraph(target=self.target)
        for node in self.nodes:
            graph.add_node(node.key, relevance=node.relevance)
        for edge in self.edges:
            graph.add_edge(edge.source, edge.target, relevance=edge.relevance, share=edge.share)
        return graph

    def to_dot(self) -> str:
        """The graph for Graphviz: a row for each layer, red for and blue against the target."""
        ids = {node.key: f"n{i}" for i, node in enumerate(self.nodes)}
        lines = ["digraph concepts {", '  node [shape=box, style="rounded,filled"];']
        for layer in reversed(self.layers):
            names = "; ".join(ids[node.key] for node in self.at(layer))
            lines.append(f"  {{ rank=same; {names} }}" if names else "")
        for node in self.nodes:
            name = json.dumps(f"{node.layer}: {node.concept}\n{node.relevance:.3g}")
            fill = "#f4c7bd" if node.relevance >= 0 else "#c3d9ea"
            lines.append(f'  {ids[node.key]} [label={name}, fillcolor="{fill}"];')
        for e in self.edges:
            width = 0.5 + 4.5 * min(abs(e.share or 0.0), 1.0)
            colour = "#d6604d" if e.relevance >= 0 else "#4393c3"
            style = f'label="{e.relevance:.3g}", penwidth={width:.2f}, color="{colour}"'
            lines.append(f"  {ids[e.source]} -> {ids[e.target]} [{style}];")
        return "\n".join([*(line for line in lines if line), "}", ""])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the graph: a row for each layer, edges as wide as their share.

        Args:
            path: Where to write the picture, if anywhere; the ending names the format.
        """
        from matplotlib.figure import Figure as NewFigure

        widest = max(len(self.at(layer)) for layer in self.layers)
        figure = NewFigure(figsize=(2.0 + 1.5 * widest, 0.6 + 1.5 * len(self.layers)))
        self._draw(figure.add_subplot())
        figure.tight_layout()
        if path is not None:
            figure.savefig(path)
        return figure

    def _draw(self, axes: Axes) -> None:
        places = {
            node.key: (k - (len(row) - 1) / 2, float(y))
            for y, layer in enumerate(self.layers)
            for row in [self.at(layer)]
            for k, node in enumerate(row)
        }
        for e in self.edges:
            (x0, y0), (x1, y1) = places[e.source], places[e.target]
            colour = "#d6604d" if e.relevance >= 0 else "#4393c3"
            width = 0.6 + 6 * min(abs(e.share or 0.0), 1.0)
            axes.plot([x0, x1], [y0, y1], color=colour, linewidth=width, alpha=0.6, zorder=1)
            shown = "" if e.share is None else f"{e.share:.0%}"
            near = (x1 - 0.3 * (x1 - x0), y1 - 0.3 * (y1 - y0))
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.text(*near, shown, fontsize=7, ha="center", va="center", zorder=2, bbox=box)
        for node in self.nodes:
            fill = "#f4c7bd" if node.relevance >= 0 else "#c3d9ea"
            box = {"boxstyle": "round,pad=0.4", "edgecolor": "#555555", "facecolor": fill}
            text = f"{node.concept}\n{node.relevance:.2g}"
            axes.text(*places[node.key], text, ha="center", va="center", fontsize=9, bbox=box)
        left = min(x for x, _ in places.values()) - 0.7
        for y, layer in enumerate(self.layers):
            axes.text(left, y, layer, ha="right", va="center", fontsize=9, parse_math=False)
        axes.set_xlim(left - 0.6, max(x for x, _ in places.values()) + 0.6)
        axes.set_ylim(-0.5, len(self.layers) - 0.5)
        axes.set_title(self.target, fontsize=9, parse_math=False)
        axes.axis("off")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph as JSON."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttributionGraph:
        """Read what ``save`` wrote.

        Raises:
            InputError: The file cannot be read, or was not written by ``save``.
        """
        try:
            with open(path, encoding="utf-8") as file:
                stored = json.load(file)
            nodes = tuple(ConceptNode(**node) for node in stored["nodes"])
            edges = tuple(
                ConceptEdge(**{**e, "source": tuple(e["source"]), "target": tuple(e["target"])})
                for e in stored["edges"]
            )
            return cls(tuple(stored["layers"]), nodes, edges, stored["target"])
        except Exception as error:  # whatever a missing or damaged file leads to
            raise InputError(
                f"{os.fspath(path)!s} holds no graph: {type(error).__name__}: {error}",
                fix="give a file written by AttributionGraph.save().",
            ) from error

    def __repr__(self) -> str:
        lines = [f"AttributionGraph({len(self.nodes)} concepts, {len(self.edges)} edges)"]
        lines.append(f"target   {self.target}")
        for node in self.nodes:
            goes = ", ".join(
                f"{e.target[0]}: {e.target[1]} ({e.relevance:.3g})"
                for e in self.edges
                if e.source == node.key
            )
            lines.append(
                f"  {node.layer}: {node.concept}  R {node.relevance:.3g}"
                + (f"  -> {goes}" if goes else "")
            )
        return "\n".join(lines)


def attribution_graph(
    explainer: Explainer,
    inputs: Any,
    target: Target = None,
    *,
    layers: Sequence[str],
    width: Sequence[int],
    begin: Mapping[str, Sequence[int]] | int = 1,
    by: Literal["absolute", "signed"] = "absolute",
    kinds: Mapping[str, Concept] | None = None,
) -> AttributionGraph:
    """Which concepts of lower layers gave concepts of higher layers their relevance.

    From each concept that is shown relevance goes on downwards, by the model's own graph: to the
    next layer, and around it where there is a way. Of each layer that it comes to through no other
    the most relevant concepts are shown, and followed.

    Args:
        explainer: Of the model.
        inputs: See ``lrpfx.explain``; several samples are summed.
        target: See ``lrpfx.explain``.
        layers: Places as in ``conditions=``, from the inputs to the output.
        width: How many concepts of each layer below the last are followed from one concept, from
            the output to the inputs: one number less than layers.
        begin: Concepts of the last layer to begin with, ``{layer: [4]}``, or how many of its most
            relevant ones.
        by: What counts as most relevant.
        kinds: By layer, the kind of concept; channels elsewhere.

    Raises:
        SelectorError: Layers or concepts that are not there, or a width that does not fit.
    """
    kinds = {layer: (kinds or {}).get(layer, Channel()) for layer in layers}
    top = _check(layers, width, begin)
    first = explainer(inputs, target, layers=[top], ledger=False)
    walk = _Walk(explainer, inputs, tuple(layers), kinds, by)
    arrived: dict[str, Tensor] = {top: first.layers[top].relevance}
    number = begin if isinstance(begin, int) else 0
    chosen = {top: walk.best(top, arrived[top], number)}
    if isinstance(begin, Mapping):
        chosen[top] = walk.numbers(top, begin[top])
    wide = dict(zip(reversed(layers[:-1]), width, strict=True))
    edges: list[tuple[tuple[str, int], tuple[str, int], float]] = []
    relevance: dict[tuple[str, int], float] = {}
    for layer in reversed(layers):
        concepts = chosen.get(layer, [])
        if not concepts:
            continue
        scores = walk.scores(layer, arrived[layer])
        concepts.sort(key=lambda c: -walk.worth(scores[c]))
        relevance.update({(layer, c): scores[c] for c in concepts})
        below = layers[: layers.index(layer)]
        for source, found in walk.below(layer, arrived[layer], concepts, below) if below else ():
            for lower, came in found.items():
                shares = walk.scores(lower, came)
                followed = [c for c in walk.best(lower, came, wide[lower]) if shares[c] != 0]
                edges += [((layer, source), (lower, c), shares[c]) for c in followed]
                if followed:
                    known = chosen.setdefault(lower, [])
                    known += [c for c in followed if c not in known]
                    kept = walk.kept(lower, came, followed)
                    arrived[lower] = arrived[lower] + kept if lower in arrived else kept
    return AttributionGraph(
        layers=tuple(layers),
        nodes=tuple(ConceptNode(layer, c, r) for (layer, c), r in relevance.items()),
        edges=tuple(
            ConceptEdge(a, b, r, r / relevance[a] if relevance[a] else None) for a, b, r in edges
        ),
        target=first.report.target,
    )


def _check(layers: Sequence[str], width: Sequence[int], begin: Any) -> str:
    """The last layer."""
    names = isinstance(layers, (list, tuple)) and all(isinstance(name, str) for name in layers)
    if not names or not layers or len(set(layers)) != len(layers):
        raise SelectorError(
            f"layers={layers!r} are no places.", fix='give each once, such as ["conv1", "conv2"].'
        )
    sizes = isinstance(width, (list, tuple)) and all(isinstance(w, int) and w > 0 for w in width)
    if not sizes or len(width) != len(layers) - 1:
        raise SelectorError(
            f"width={width!r} does not fit {len(layers)} layers.",
            fix=f"give {len(layers) - 1} numbers, from the output to the inputs.",
        )
    whole = isinstance(begin, int) and not isinstance(begin, bool) and begin > 0
    if not whole and not (isinstance(begin, Mapping) and list(begin) == [layers[-1]]):
        raise SelectorError(
            f"begin={begin!r} names no concepts of the last layer.",
            fix=f"give {{{layers[-1]!r}: [...]}}, or how many of its most relevant ones.",
        )
    return layers[-1]


@dataclass
class _Walk:
    """Relevance from concept to concept."""

    explainer: Explainer
    inputs: Any
    layers: tuple[str, ...]
    kinds: Mapping[str, Concept]
    by: str

    def __post_init__(self) -> None:
        """Take every kind of concept as it is at its layer."""
        found = self.explainer(self.inputs, layers=self.layers, ledger=False).layers
        self.activations = {layer: found[layer].activation for layer in self.layers}
        placed = {}
        for layer, activation in self.activations.items():
            try:
                placed[layer] = self.kinds[layer].at(activation.shape, found[layer].channels)
            except ValueError as error:
                raise SelectorError(f"{layer}: {error}.", fix="give its kind in kinds=.") from error
        self.kinds = placed

    def worth(self, score: float) -> float:
        return abs(score) if self.by == "absolute" else score

    def scores(self, layer: str, relevance: Tensor) -> list[float]:
        """Relevance of each concept, summed over samples."""
        encoded = self.kinds[layer].encode(relevance, self.activations[layer])
        found: list[float] = encoded.sum(0).tolist()
        return found

    def best(self, layer: str, relevance: Tensor, number: int) -> list[int]:
        """The most relevant concepts; of equal ones the first."""
        scores = self.scores(layer, relevance)
        return sorted(range(len(scores)), key=lambda c: -self.worth(scores[c]))[:number]

    def numbers(self, layer: str, concepts: Sequence[Any]) -> list[int]:
        activation = self.activations[layer]
        count = len(self.scores(layer, activation))
        try:
            kind = self.kinds[layer]
            return [kind.number(c, activation.shape[1:], count) for c in concepts]
        except ValueError as error:
            raise SelectorError(f"begin={{{layer!r}: ...}}: {error}.") from error

    def kept(self, layer: str, relevance: Tensor, concepts: Sequence[int]) -> Tensor:
        """The relevance of some concepts only."""
        kind, activation = self.kinds[layer], self.activations[layer]
        weights = kind.encode(relevance, activation) * 0
        weights[:, list(concepts)] = 1.0
        return kind.mask(relevance, activation, weights)

    def below(
        self, layer: str, relevance: Tensor, concepts: Sequence[int], lower: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """What comes from each concept to lower layers through none of the others."""
        closed: dict[str, Any] = {name: (self.kinds[name], []) for name in lower}
        found = self.explainer(
            self.inputs,
            start=layer,
            init=relevance,
            conditions=[{layer: (self.kinds[layer], [c]), **closed} for c in concepts],
            through="all",
            ledger=False,
        ).layers
        for k, concept in enumerate(concepts):
            yield concept, {name: found[name].relevance[k] for name in lower}
