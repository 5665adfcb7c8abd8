"""Train a small vision transformer on handwritten digits and explain it under four composites.

    python examples/vit.py [picture.png]

Training takes seconds. The picture shows what spoke for the true class of each digit (red) and what
spoke against it (blue). To see that the maps are about the model, pixels are blackened: those with
the most relevance must cost the class more than as many others of the digit.
"""

import sys
from pathlib import Path

import torch
from quickstart import load, train
from torch import Tensor, nn

import lrpfx
from lrpfx.heatmap import grid

COMPOSITES = ["attnlrp", "cplrp", "epsilon_plus", "epsilon_plus_flat"]
BLACKENED = 20  # pixels, of about 150 that a digit covers
LEAST_ACCURACY = 0.95


class VisionTransformer(nn.Module):
    """Torch's own transformer layers over 25 patches and a class token: (N, 1, 20, 20) -> (N, 10).

    Convolutions make the patches (Xiao et al. 2021): so it learns from a thousand images.
    """

    def __init__(self, width: int = 48, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, width, 3, stride=2, padding=1),
        )
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 26, width))
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            2 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (N, 25, width)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.encoder(x)[:, 0]))


def without(x: Tensor, score: Tensor) -> Tensor:
    """Blacken the pixels with the highest score."""
    best = score.flatten(1).topk(BLACKENED).indices
    return x.flatten(1).scatter(1, best, 0.0).view_as(x)


def main(path: Path) -> None:
    torch.manual_seed(0)
    x_train, x_test, y_train, y_test = load()
    model = VisionTransformer()
    train(model, x_train, y_train, epochs=12)
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"test accuracy: {accuracy:.3f}")
    if accuracy <= LEAST_ACCURACY:
        sys.exit(f"the model is not worth explaining: accuracy must be over {LEAST_ACCURACY}")

    def logit(x: Tensor) -> float:
        with torch.no_grad():
            return model(x).gather(1, y_test[:, None]).mean().item()

    ink = x_test > 0.1
    at_random = logit(without(x_test, torch.rand_like(x_test) * ink))
    print(f"logit of the true class, mean over the test images: {logit(x_test):.2f}")
    print(f"  without {BLACKENED} random pixels of the digit: {at_random:.2f}")

    # The first test image of each of six classes.
    digits = torch.stack([(y_test == label).nonzero()[0, 0] for label in (0, 2, 3, 4, 6, 8)])
    columns = {}
    for name in COMPOSITES:
        explanation = lrpfx.explain(model, x_test, target=y_test, rules=name)
        columns[name] = explanation.relevance[digits]
        left = logit(without(x_test, explanation.relevance * ink))
        print(f"  without the {BLACKENED} most relevant under {name}: {left:.2f}")
        print(*(line for line in explanation.report.summary() if line.startswith("ledger")))
        if left >= at_random:
            sys.exit(f"{name} points at pixels that do not matter")

    path.parent.mkdir(parents=True, exist_ok=True)
    grid(x_test[digits], columns, path=path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("examples/out/vit.png"))
