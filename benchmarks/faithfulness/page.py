"""What was measured -> the page and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.faithfulness.measure import STEPS, Outcome, Result
from benchmarks.measure import environment
from lrpfx.evaluate import Interval, interval

#: What is drawn as curves, beside the best, and in which colour.
_DRAWN = ("default (rules=None)", "integrated gradients", "random")
_CURVES = dict(zip(_DRAWN, ("#b2182b", "#4d4d4d", "#b8b8b8"), strict=True))
#: What libraries are drawn in.
COLORS = {
    "lrpfx": "#b2182b",
    "gradients": "#4d4d4d",
    "captum": "#2166ac",
    "zennit": "#1b7837",
    "LXT": "#762a83",
    "none": "#b8b8b8",
}


@dataclass(frozen=True)
class Line:
    """One method on one network, over all seeds: arrays are (S, N)."""

    library: str
    name: str
    results: list[Result]

    @property
    def label(self) -> str:
        """How the table calls it."""
        return self.name if self.library in ("gradients", "none") else f"{self.library} {self.name}"

    @property
    def refused(self) -> str:
        """Why there are no numbers, "" if there are."""
        return next((r.refused for r in self.results if r.refused), "")

    def values(self, what: str) -> np.ndarray | None:
        """Of a metric."""
        found = [getattr(r, what) for r in self.results]
        return None if any(f is None for f in found) else torch.stack(found).double().numpy()

    @property
    def abpc(self) -> np.ndarray:
        """The metric that is sorted by."""
        found = self.values("abpc")
        assert found is not None
        return found


def lines_of(outcomes: Sequence[Outcome]) -> tuple[list[Line], list[Line]]:
    """The methods of one network, the best first, and those that have no numbers."""
    keys = [(r.library, r.name) for r in outcomes[0].results]
    lines = [
        Line(*key, [next(r for r in o.results if (r.library, r.name) == key) for o in outcomes])
        for key in dict.fromkeys(keys)
    ]
    good = [line for line in lines if not line.refused]
    good.sort(key=lambda line: -line.abpc.mean())
    return good, [line for line in lines if line.refused]


def as_good(line: Line, best: Line) -> bool:
    """Whether the best is not better, by the interval of the differences on the same samples."""
    return line is best or interval(best.abpc - line.abpc).low <= 0


def write(outcomes: Mapping[str, Sequence[Outcome]], docs: Path | None) -> None:
    """Print the tables, and write page and pictures if there is a folder."""
    sections, picture = [], []
    for some in outcomes.values():
        if not some:
            continue
        good, refused = lines_of(some)
        picture.append((some[0].name, good))
        sections.append(_section(some, good, refused))
    body = "\n\n".join([_summary(picture), *sections])
    print(body)
    if docs is not None:
        first = next(o for some in outcomes.values() for o in some)
        seeds = max(o.seed for some in outcomes.values() for o in some) + 1
        head = _HEAD.format(
            seeds=seeds,
            drawn="networks and samples" if seeds > 1 else "samples; another network may differ",
            samples=len(next(r for r in first.results if not r.refused).abpc),
            steps=STEPS,
            environment=environment(),
        )
        (docs / "faithfulness.md").write_text(f"{head}\n{body}\n")
        _areas(picture).savefig(docs / "faithfulness.png", dpi=110)
        _curves(picture).savefig(docs / "faithfulness_curves.png", dpi=110)


_HEAD = """# How faithful explanations are, beside every peer

`make faithfulness` writes this page. Each network is trained here from {seeds} draw(s) of
weights, on data that ships in packages or is generated; {samples} test samples of each are
explained, for the class that the network predicts, whether it is right or not. The rows are in
order of faithfulness, whoever they belong to. **Bold** is what the best is not better than: the
interval of the difference on the same samples holds zero.

- **ABPC**: the area between two curves of the probability of that class, one while the least, one
  while the most relevant parts are erased first, in {steps} steps
  ([Samek et al. 2017](https://arxiv.org/abs/1509.06321),
  [Blücher et al. 2024](https://arxiv.org/abs/2401.06654)). A random order has 0. What is erased is
  filled with the mean of the image, signal, or the sentence's embeddings. Parts are pixels
  (digits), squares of 4 by 4 pixels (shapes, discs), pairs of time steps, or tokens.
- **pointing**: how often the largest relevance is where the shape, or the token that is copied, is
  ([Zhang et al. 2018](https://arxiv.org/abs/1608.00507)).
- **mass**: the part of positive relevance that is there
  ([Kohlbrenner et al. 2020](https://arxiv.org/abs/1910.09840)).
- **sum / logit**: the median of the sum of relevance, of what is explained; 1 is conserved. It is
  no measure of what gradients are for.
- **ms**: CPU time per sample on one thread in a batch of {samples}, without set-up.

In brackets are 95 % intervals of a bootstrap over {drawn}.
{environment}

Rows of lrpfx are named by their `rules=`; those without a library are `lrpfx.attributors`, which
agree with captum's of the same name (captum's for tokens begins at token 0, ours at an embedding of
zeros). zennit runs with the canonizers of its documentation (`SequentialMergeBatchNorm`,
`ResNetCanonizer`), LXT with transformers 4.52.4 in an environment of its own (it fails with 5),
with the patches and rules of its examples. All relevance begins with the logit.

![ABPC of all methods on five networks](faithfulness.png)

![Probabilities while parts are erased](faithfulness_curves.png)
"""


#: The columns of the summary: what they are called, and which methods count.
_BEST_OF: dict[str, Callable[[Line], bool]] = {
    "default": lambda line: line.name == _DRAWN[0],
    "lrpfx": lambda line: line.library == "lrpfx",
    "zennit": lambda line: line.library == "zennit",
    "LXT": lambda line: line.library == "LXT",
    "captum": lambda line: line.library == "captum",
    "integrated gradients": lambda line: line.name == "integrated gradients",
    "occlusion": lambda line: line.name == "occlusion",
    "gradient x input": lambda line: line.name == "gradient x input",
}


def _summary(networks: Sequence[tuple[str, Sequence[Line]]]) -> str:
    """The best method of each network, and the best ABPC of each library."""
    rows = ["| network | best | " + " | ".join(_BEST_OF) + " |"]
    rows.append("|" + " --- |" * (2 + len(_BEST_OF)))
    for name, lines in networks:
        cells = []
        for counts in _BEST_OF.values():
            means = [line.abpc.mean() for line in lines if counts(line)]
            cells.append(f"{max(means):.2f}" if means else "")
        rows.append(f"| {name} | {lines[0].label} | " + " | ".join(cells) + " |")
    text = "ABPC: of lrpfx's default, of the best that each library has, and of three others."
    return "\n".join(["## In short", "", text, "", *rows])


def _section(outcomes: Sequence[Outcome], good: Sequence[Line], refused: Sequence[Line]) -> str:
    accuracy = ", ".join(f"{100 * o.accuracy:.1f} %" for o in outcomes)
    where = good[0].values("mass") is not None
    columns = ["method", "ABPC", *(["pointing", "mass"] if where else []), "sum / logit", "ms"]
    rows = []
    for line in good:
        label = f"**{line.label}**" if as_good(line, good[0]) else line.label
        cells = [label, _told(line.abpc)]
        if where:
            for what in ("pointing", "mass"):
                values = line.values(what)
                assert values is not None
                cells.append(_told(values))
        conserved = line.values("conserved")
        assert conserved is not None
        ms = float(np.median([r.ms for r in line.results]))
        cells += [f"{np.median(conserved):.2f}", f"{ms:.2g}"]
        rows.append(cells)
    table = [
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    name = outcomes[0].name
    text = [f"## {name[0].upper()}{name[1:]}", "", f"Accuracy on test samples: {accuracy}.", ""]
    text += table
    if refused:
        text += ["", "No numbers:", ""]
        text += [f"- {line.label}: `{line.refused[:140]}`" for line in refused]
    return "\n".join(text)


def _told(values: np.ndarray) -> str:
    found: Interval = interval(values)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _areas(networks: Sequence[tuple[str, Sequence[Line]]]) -> Figure:
    """A point with its interval per method, a panel per network."""
    most = max(len(lines) for _, lines in networks)
    figure = Figure(figsize=(15, 0.22 * most * 2 + 2), layout="constrained")
    for at, (name, lines) in enumerate(networks):
        ax = figure.add_subplot(2, 3, at + 1)
        for k, line in enumerate(lines):
            found, color = interval(line.abpc), COLORS[line.library]
            ax.plot([found.low, found.high], [-k, -k], color=color, linewidth=2)
            ax.plot([found.mean], [-k], "o", color=color, markersize=4)
        ax.axvline(0, color="#c8c8c8", linewidth=0.8, zorder=0)
        ax.set_yticks([-k for k in range(len(lines))], [line.label for line in lines], fontsize=7)
        for tick, line in zip(ax.get_yticklabels(), lines, strict=True):
            tick.set_color(COLORS[line.library])
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("ABPC", fontsize=8)
        ax.tick_params(axis="x", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _curves(networks: Sequence[tuple[str, Sequence[Line]]]) -> Figure:
    """The probability while parts are erased, a panel per network; LeRF is above MoRF."""
    from lrpfx.draw import draw_curves

    figure = Figure(figsize=(14, 7), layout="constrained")
    for at, (name, lines) in enumerate(networks):
        ax = figure.add_subplot(2, 3, at + 1)
        chosen = [lines[0], *(line for line in lines[1:] if line.name in _DRAWN)]
        for k, line in enumerate(chosen):
            both = [r.curves for r in line.results if r.curves is not None]
            for part, curves in enumerate(zip(*both, strict=True)):
                values = torch.cat(list(curves)).double().numpy()
                x = np.linspace(0, 1, values.shape[1])
                label = line.label + " (best)" * (k == 0) if part == 0 else "_"
                draw_curves(
                    x,
                    {label: values},
                    xlabel="part erased",
                    ylabel="probability",
                    title=name,
                    ax=ax,
                    colors=[_CURVES.get(line.name, "#1b7837")],
                )
        ax.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=7)
    return figure
