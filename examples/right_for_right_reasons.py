"""Train on relevance: digits whose label stands in a corner, with a penalty on looking there.

    python examples/right_for_right_reasons.py [picture.png]

Each training image has its label in the upper left corner, as four pixels of a binary number. A
network learns to read these. The same network with a penalty on the share of relevance that lies on
the corner learns the digits. Batch norm is trained with both: output and relevance come from one
forward pass by the statistics of the batch (bn="batch"). On one core this takes half a minute.

Source: Ross et al. 2017, Right for the right reasons (arXiv 1703.03717), there with gradients.
"""

import sys
from pathlib import Path

print("1 of 3  importing torch and scikit-learn", flush=True)

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import lrpfx
from lrpfx.heatmap import grid

EPOCHS = 12
BATCH = 64
PENALTY = 5.0
RULES = "epsilon_plus"


class Net(nn.Module):
    """(N, 1, 12, 12) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 6 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(x.flatten(1))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits in 0..1 as (N, 1, 12, 12): training and test images, then their labels."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    x, y = F.pad(x, (3, 1, 3, 1)), torch.tensor(labels)
    train, test = train_test_split(torch.arange(len(y)), test_size=0.25, random_state=0, stratify=y)
    return x[train], x[test], y[train], y[test]


def marked(x: Tensor, labels: Tensor) -> Tensor:
    """The images with label + 1 as a binary number in the corner."""
    bits = (labels[:, None] + 1) >> torch.arange(4) & 1
    x = x.clone()
    x[:, 0, :2, :2] = bits.reshape(-1, 2, 2).to(x)
    return x


def share(relevance: Tensor) -> Tensor:
    """Of absolute relevance how much lies on the corner, (N,)."""
    size = relevance.abs().sum((1, 2, 3)) + 1e-9
    return relevance[:, :, :2, :2].abs().sum((1, 2, 3)) / size


def train(x: Tensor, y: Tensor, penalty: float) -> Net:
    torch.manual_seed(0)
    model = Net().train()
    explainer = lrpfx.Explainer(model, x[:BATCH], RULES, bn="batch")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            explanation = explainer(x[batch], y[batch], create_graph=True)
            loss = F.cross_entropy(explanation.output, y[batch])
            loss = loss + penalty * share(explanation.relevance).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"        epoch {epoch + 1:2} of {EPOCHS}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def accuracy(model: Net, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main(path: Path) -> None:
    x_train, x_test, y_train, y_test = load()
    other = (y_test + 1 + torch.arange(len(y_test)) % 9) % 10
    tests = {
        "own mark": marked(x_test, y_test),
        "no mark": x_test,
        "another's mark": marked(x_test, other),
    }
    digits = torch.stack([(y_test == label).nonzero()[0, 0] for label in (0, 2, 3, 4, 6, 8)])
    shown = tests["own mark"][digits]
    columns, lines = {}, []
    for k, (name, penalty) in enumerate({"without penalty": 0.0, "with penalty": PENALTY}.items()):
        print(f"{k + 2} of 3  training {name}", flush=True)
        model = train(marked(x_train, y_train), y_train, penalty)
        accuracies = [accuracy(model, x, y_test) for x in tests.values()]
        explainer = lrpfx.Explainer(model, shown, RULES)
        on_mark = share(explainer(tests["own mark"], y_test).relevance).mean().item()
        columns[name] = explainer(shown, y_test[digits]).relevance
        lines.append([name, *(f"{a:.3f}" for a in accuracies), f"{on_mark:.3f}"])
    head = ["", *(f"accuracy, {name}" for name in tests), "relevance on the mark"]
    for line in [head, *lines]:
        print("  ".join(f"{cell:>24}" for cell in line))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(shown, columns, [f"class {label}" for label in y_test[digits].tolist()], path=path)
    print(f"wrote {path}")
    if float(lines[1][2]) <= float(lines[0][2]) or float(lines[1][4]) >= float(lines[0][4]):
        sys.exit("the penalty did not turn the network away from the mark")


if __name__ == "__main__":
    default = Path("examples/out/right_for_right_reasons.png")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
