"""How the cost grows: ``python -m benchmarks.scaling``.

An explanation over the gradient, against depth (residual blocks), batch size and number of tokens.
If the ratio is flat, an explanation scales as the gradient does. ``--write`` also draws
docs/scaling.png.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lrpfx
from benchmarks import works
from benchmarks.coverage import randomize
from benchmarks.measure import (
    DOCS,
    Call,
    Table,
    Work,
    command,
    gradient,
    interleaved,
    milliseconds,
    publish,
    quartiles,
    ratio,
    relevance_call,
)

COLUMNS = ("against", "size", "composite", "gradient, ms", "lrpfx, ms", "ratio", "map differs")


class Block(nn.Module):
    """A residual block: two convolutions with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """relu(x + f(x)); half of each, so that deep ones stay finite."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(0.5 * (x + y))


def residual(blocks: int, batch: int = 1, width: int = 32, side: int = 32) -> Work:
    """A residual network of so many blocks."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    network = nn.Sequential(*stem, *(Block(width) for _ in range(blocks)), *head)
    model = randomize(network, torch.randn(8, 3, side, side))
    return Work(f"{blocks} blocks", model, torch.randn(batch, 3, side, side), works.score_of_class)


@dataclass(frozen=True)
class Series:
    """One line of the plot.

    Args:
        against: What grows.
        rules: The composite.
        sizes: How far.
        make: Size -> what is explained.
    """

    against: str
    rules: str
    sizes: Sequence[int]
    make: Callable[[int], Work]


SERIES = (
    Series("residual blocks", "epsilon_plus", (2, 4, 8, 16, 32), residual),
    Series("batch size", "epsilon_plus", (1, 2, 4, 8, 16), lambda n: residual(4, n)),
    Series("tokens", "attnlrp", (64, 128, 256, 512, 1024), lambda t: works.llama(t, 2, 128)),
)
Point = tuple[int, tuple[float, float, float]]


def table(series: Sequence[Series], budget: float) -> tuple[Table, dict[str, list[Point]]]:
    """The table, and by what grows the ratio's quartiles, for the plot."""
    made = Table("How the cost grows", COLUMNS)
    points: dict[str, list[Point]] = {}
    for line in series:
        for size in line.sizes:
            work = line.make(size)
            explainer = lrpfx.Explainer(work.model, work.inputs, line.rules, freeze=True)
            calls: dict[str, Call] = {
                "gradient": gradient(work),
                "lrpfx": relevance_call(explainer, work),
            }
            expected = relevance_call(explainer, work, ledger=True)()
            label = f"{line.against} {size}"
            differs = made.check(label, calls["lrpfx"](), expected)
            calls["gradient"]()
            times = interleaved(calls, budget)
            ratios = [a / b for a, b in zip(times["lrpfx"], times["gradient"], strict=True)]
            points.setdefault(line.against, []).append((size, quartiles(ratios)))
            made.add(
                line.against,
                str(size),
                line.rules,
                milliseconds(times["gradient"]),
                milliseconds(times["lrpfx"]),
                ratio(times["lrpfx"], times["gradient"]),
                differs,
            )
    return made, points


def draw(points: dict[str, list[Point]], path: Path) -> None:
    """One panel for each thing that grows: the ratio's median, and its quartiles as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(points), 2.8), layout="constrained")
    for axes, (against, line) in zip(
        figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True
    ):
        sizes = [size for size, _ in line]
        low, middle, high = zip(*(q for _, q in line), strict=True)
        axes.fill_between(sizes, low, high, alpha=0.25, linewidth=0)
        axes.plot(sizes, middle, marker="o", markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, map(str, sizes))
        axes.set_xlabel(against)
        axes.set_ylim(0, None)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("explanation / gradient")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Print the table, and draw it."""
    options = command("scaling", __doc__).parse_args()
    warnings.simplefilter("ignore")
    series = [line for line in SERIES if options.only in line.against]
    made, points = table(series, options.seconds / 2)
    if options.write and not options.only:
        draw(points, DOCS / "scaling.png")
        made.notes.append("![The ratio against blocks, batch size and tokens](scaling.png)")
    return publish("scaling", made, options.write)


if __name__ == "__main__":
    sys.exit(main())
