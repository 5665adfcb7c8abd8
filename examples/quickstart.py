"""Train a small residual network on handwritten digits and explain it under four composites.

    python examples/quickstart.py [picture.png]

The digits come with scikit-learn; on two cores training takes half a minute. The picture shows what
spoke for the true class of each digit (red) and what spoke against it (blue).
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

EPOCHS = 8
BATCH = 64
LEAST_ACCURACY = 0.97  # explanations of a model that has learned nothing explain nothing


class Block(nn.Module):
    """Two convolutions and a skip connection, spelled the way people spell it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    """A residual network: (N, 1, 20, 20) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.block1 = Block(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.block2 = Block(32)
        self.head = nn.Linear(32 * 5 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(F.relu(self.bn(self.stem(x))))
        x = self.block2(F.relu(self.down(x)))
        return self.head(F.max_pool2d(x, 2).flatten(1))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits in 0..1 as (N, 1, 20, 20): training and test images, then their labels."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    # The digits touch the border of their 8 x 8 pixels; some room and size make better pictures.
    x = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear")
    y = torch.tensor(labels)
    train, test = train_test_split(torch.arange(len(y)), test_size=0.25, random_state=0, stratify=y)
    return x[train], x[test], y[train], y[test]


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int = EPOCHS) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        print(f"  epoch {epoch + 1} of {epochs}", end="\r", flush=True)
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def main(path: Path) -> None:
    torch.manual_seed(0)
    x_train, x_test, y_train, y_test = load()
    model = Net()
    print(
        f"2 of 3  training a residual network on {len(x_train)} digits, {EPOCHS} epochs", flush=True
    )
    train(model, x_train, y_train)
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"  test accuracy: {accuracy:.3f}")
    if accuracy <= LEAST_ACCURACY:
        sys.exit(f"the model is not worth explaining: accuracy must be over {LEAST_ACCURACY}")

    # The first test image of each of six classes.
    digits = torch.stack([(y_test == label).nonzero()[0, 0] for label in (0, 2, 3, 4, 6, 8)])
    x, labels = x_test[digits], y_test[digits]
    composites = {
        "epsilon_all": "epsilon_all",
        "epsilon_plus": "epsilon_plus",
        "epsilon_plus_flat": "epsilon_plus_flat",
        "EpsilonGammaBox": lrpfx.composites.EpsilonGammaBox(low=0.0, high=1.0),
    }
    columns = {}
    print(f"3 of 3  explaining {len(x)} digits under {len(composites)} rule sets", flush=True)
    for name, rules in composites.items():
        explanation = lrpfx.explain(model, x, target=labels, rules=rules)
        columns[name] = explanation.relevance
    print(explanation.report)

    logits = explanation.output[torch.arange(len(labels)), labels]
    titles = [
        f"class {label}: {logit:.2f}"
        for label, logit in zip(labels.tolist(), logits.tolist(), strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(x, columns, titles, path=path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("examples/out/quickstart.png"))
