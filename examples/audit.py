"""Audit a network that has learned a shortcut, find the shortcut without knowing it, correct it.

    python examples/audit.py [folder]

Most 8s of the training digits carry a bright corner mark. The network is right on the test digits,
and wrong as soon as a digit of another class carries the mark. Three views of the training data
point at it: the strategies among the maps of the class (SpRAy), the samples that show its concepts
best (RelMax), and the prototypes of its concept relevance (PCX). Then the direction of the mark is
projected out of the features. Pages and pictures are written; it takes a minute on two cores.
"""

import copy
import sys
from pathlib import Path

import torch
from concepts import network
from quickstart import load, train
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lrpfx
from lrpfx.concepts import Prototypes, scan
from lrpfx.spray import SpectralRelevance

DIGIT = 8
SHARE = 0.6  # of the training samples of the class that are marked
LAYER = "7"  # the last convolution


def mark(x: Tensor) -> Tensor:
    """The same digits with a bright square in a corner, where digits have nothing."""
    x = x.clone()
    x[:, :, 1:4, 1:4] = 1.0
    return x


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def told(name: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Accuracy on the test digits as they are, and with the mark on those of other classes."""
    others = y != DIGIT
    plain, marked = accuracy(model, x, y), accuracy(model, mark(x[others]), y[others])
    print(f"{name:9} accuracy: {plain:6.1%} as they are, {marked:6.1%} of other digits marked")


def without(model: nn.Sequential, direction: Tensor, centre: Tensor) -> nn.Sequential:
    """The model with a direction of what its last layer reads held at a point."""
    model = copy.deepcopy(model)
    head = model[-1]
    assert isinstance(head, nn.Linear)
    v = direction / direction.norm()
    with torch.no_grad():
        head.bias += head.weight @ v * (v @ centre)
        head.weight -= torch.outer(head.weight @ v, v)
    return model


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x_train, x_test, y_train, y_test = load()
    own = (y_train == DIGIT).nonzero().flatten()
    planted = own[: int(SHARE * len(own))]
    x_train[planted] = mark(x_train[planted])
    is_marked = torch.isin(torch.arange(len(x_train)), planted)
    model = network()
    train(model, x_train, y_train)
    told("trained", model, x_test, y_test)

    # 1. Strategies: how is the class recognised?
    explainer = lrpfx.Explainer(model, x_train[:2], "epsilon_plus")
    explanation = explainer(x_train[own], DIGIT, ledger=False)
    maps = explanation.relevance
    spray = SpectralRelevance().fit(maps)
    strategies = spray.summary(y_train[own], explanation.output.argmax(1))
    print(strategies)
    strategies.to_html(
        folder / "strategies.html", maps=maps, images=x_train[own], placed=spray.embed(),
        names=[str(i) for i in own.tolist()], title=f"Strategies for class {DIGIT}",
    )  # fmt: skip
    # Of the clusters, that whose mean map is most in one place is looked at, and those like it.
    peaks = [float(s.mean.max() / s.mean[s.mean > 0].sum()) for s in strategies.clusters]
    odd = strategies.clusters[peaks.index(max(peaks))]
    row, column = divmod(int(odd.mean.argmax()), spray.shape_[1])
    alike = [s for s in strategies.clusters if int(s.mean.argmax()) == int(odd.mean.argmax())]
    found = own[[i for s in alike for i in s.samples]]
    suspect = torch.isin(torch.arange(len(x_train)), found)
    agree = (suspect[own] == is_marked[own]).float().mean()
    print(
        f"{len(alike)} of them look at row {row}, column {column} of {spray.shape_}: "
        f"{len(found)} samples, which agrees with the mark on {agree:.1%} of the class"
    )

    # 2. Concepts: which carry it, and which samples show them?
    data = TensorDataset(x_train, y_train)
    table = scan(explainer, data, layers=["3", LAYER], out=folder / "scan", k=10, progress=False)
    vectors = torch.from_numpy(table.vectors(LAYER))
    rest = (y_train == DIGIT) & ~suspect
    more = vectors[suspect].mean(0) - vectors[rest].mean(0)
    concept = int(more.argmax())
    references = table.references(LAYER, concept, k=8, target=DIGIT)
    count = sum(bool(is_marked[r.sample]) for r in references)
    print(
        f"concept {concept} tells them apart; {count} of its 8 references of the class are marked"
    )
    table.plot(
        LAYER, [concept], dataset=data, explainer=explainer, target=DIGIT,
        path=folder / "audit.png",
    )  # fmt: skip
    table.to_html(folder / "concepts.html", dataset=data, explainer=explainer, progress=False)

    # 3. Prototypes: what is ordinary for the class?
    prototypes = Prototypes({DIGIT: 2}, covariance="diag").fit(vectors, y_train)
    for prototype in prototypes.nearest(8):
        if prototype.label == DIGIT:
            share = is_marked[list(prototype.samples)].float().mean()
            print(
                f"prototype {prototype.component} of {DIGIT}: {prototype.weight:.0%} of the class, "
                f"{share:.0%} of its nearest are marked"
            )

    # 4. The direction from the class's other samples to the suspects is taken out.
    with torch.no_grad():
        features = model[:-1](x_train)
    centre = features[rest].mean(0)
    corrected = without(model, features[suspect].mean(0) - centre, centre)
    told("corrected", corrected, x_test, y_test)
    before, after = (
        lrpfx.Explainer(m, x_train[:2], "epsilon_plus")(mark(x_test[:200]), DIGIT, ledger=False)
        for m in (model, corrected)
    )
    in_corner = [float(e.relevance[:, :, :5, :5].sum()) / 200 for e in (before, after)]
    print(
        f"relevance of the mark for an {DIGIT}: {in_corner[0]:.2f} before, {in_corner[1]:.2f} after"
    )
    print(f"wrote strategies.html, concepts.html and audit.png to {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("examples/out"))
