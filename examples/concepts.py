"""Train a small network on handwritten digits and ask which of its own features speak for an 8.

    python examples/concepts.py [folder]

Writes two pictures: the conditional maps of the channels that speak most for the class, and the
graph of which channel gave which its relevance. Training takes seconds on two cores.
"""

import sys
from pathlib import Path

import torch
from quickstart import load, train
from torch import nn

import lrpfx
from lrpfx.concepts import attribution_graph
from lrpfx.heatmap import grid

DIGIT = 8
SHOWN = 4


def network() -> nn.Sequential:
    """Three blocks of convolution, batch norm and ReLU: (N, 1, 20, 20) -> (N, 10)."""
    layers: list[nn.Module] = []
    for before, after in ((1, 12), (12, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if after == 16 else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 25, 10))


def main(folder: Path) -> None:
    torch.manual_seed(0)
    x_train, x_test, y_train, y_test = load()
    model = network()
    train(model, x_train, y_train)
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"test accuracy: {accuracy:.3f}")

    x = x_test[y_test == DIGIT][:4]
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    layer = "3"  # the convolution of the second block; its batch norm is folded into it
    whole = explainer(x, DIGIT, layers=[layer])
    scores = whole.concepts(layer).sum(0)
    best = scores.argsort(descending=True)[:SHOWN].tolist()
    for channel in best:
        print(f"channel {channel:2} of the second block: {scores[channel] / scores.sum():.0%}")

    each = explainer(x, DIGIT, conditions=[{layer: [channel]} for channel in best])
    maps = zip(best, each.relevance, strict=True)
    columns = {"all": whole.relevance, **{f"channel {c}": r for c, r in maps}}
    folder.mkdir(parents=True, exist_ok=True)
    grid(x, columns, path=folder / "concepts.png")

    graph = attribution_graph(
        explainer, x, DIGIT, layers=["0", "3", "7"], begin=2, width=[3, 2], by="signed"
    )
    print(graph)
    graph.plot(folder / "concept_graph.png")
    print(f"wrote {folder / 'concepts.png'} and {folder / 'concept_graph.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("examples/out"))
