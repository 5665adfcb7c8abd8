"""A name and a seed -> a trained network, test samples, and where what matters is known to be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoos import declare_missing_ops

declare_missing_ops()


@dataclass(frozen=True)
class Task:
    """What is explained.

    Args:
        name: Of the network and its data.
        kind: "cnn", "residual", "vit", "signal" or "tokens".
        model: In evaluation mode; returns logits (N, C).
        x: Test samples, (N, ...).
        classes: What is explained of each: the class that the network predicts.
        masks: Where what matters is, (N, ...), None where that is not known.
        accuracy: On test samples.
        patch: What is erased at a time.
        fill: By what.
        bounds: Smallest and largest input there is.
    """

    name: str
    kind: str
    model: nn.Module
    x: Tensor
    classes: Tensor
    masks: Tensor | None
    accuracy: float
    patch: int
    fill: Any
    bounds: tuple[float, float] = (0.0, 1.0)


# Networks ----------------------------------------------------------------------------------------


def plain_cnn() -> nn.Module:
    """Four convolutions and two linear layers, for digits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Residual(nn.Module):
    """Blocks of torchvision's ResNet, so that zennit's canonizers know them."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        def down(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 1, 2, bias=False), nn.BatchNorm2d(b))

        self.stem = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            BasicBlock(12, 12),
            BasicBlock(12, 24, 2, down(12, 24)),
            BasicBlock(24, 32, 2, down(24, 32)),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (N, 1, 32, 32)."""
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


def vision_transformer() -> nn.Module:
    """torchvision's ViT, small, of patches of 8 by 8 pixels."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=96,
        num_classes=4,
    )
    model.conv_proj = nn.Conv2d(1, 48, 8, 8)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # zero, as it comes
    return model


def signal_cnn() -> nn.Module:
    """Convolutions over time, for mnist1d."""
    return nn.Sequential(
        nn.Conv1d(1, 24, 5, padding=2),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Conv1d(24, 32, 5, stride=2, padding=2),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Conv1d(32, 32, 3, stride=2, padding=1),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(320, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Copying(nn.Module):
    """A Llama whose output is the logits after the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = llama()

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (N, V) of tokens (N, T)."""
        return self.llama(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def llama() -> nn.Module:
    """As transformers builds it, two layers of 48."""
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=SYMBOLS**2 + SYMBOLS,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    return tf.LlamaForCausalLM(config)


# Data --------------------------------------------------------------------------------------------

SYMBOLS = 8
Split = tuple[Tensor, Tensor, Tensor | None]


def digits(generator: torch.Generator, test: bool) -> Split:
    """scikit-learn's digits, (N, 1, 8, 8) in [0, 1]; every fourth is a test sample."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target, dtype=torch.long)
    chosen = (torch.arange(len(x)) % 4 == 0) == test
    return x[chosen], y[chosen], None


@functools.cache
def _mnist1d() -> dict[str, Any]:
    from mnist1d.data import get_dataset_args, make_dataset

    state = np.random.get_state()
    made: dict[str, Any] = make_dataset(get_dataset_args())
    np.random.set_state(state)
    return made


def mnist1d(generator: torch.Generator, test: bool) -> Split:
    """Signals (N, 1, 40), generated by the package mnist1d."""
    data, end = _mnist1d(), "_test" if test else ""
    x = torch.tensor(data["x" + end], dtype=torch.float32)[:, None]
    return x, torch.tensor(data["y" + end], dtype=torch.long), None


def shapes(generator: torch.Generator, test: bool) -> Split:
    """A disc, square, triangle or cross of 32 by 32 pixels among lines and noise, with its mask."""
    n = 600 if test else 2000
    seed = int(torch.randint(2**31, (), generator=generator))
    draw = np.random.default_rng(seed)
    y = draw.integers(4, size=n)
    size, images = 32, np.empty((n, 32, 32), dtype=np.float32)
    masks = np.empty((n, 32, 32), dtype=bool)
    rows, columns = np.mgrid[:size, :size]
    for i, kind in enumerate(y):
        r = draw.uniform(4.5, 7.5)
        cy, cx = draw.uniform(r, size - 1 - r, size=2)
        dy, dx = rows - cy, columns - cx
        masks[i] = (
            dy**2 + dx**2 <= r**2,
            np.maximum(abs(dy), abs(dx)) <= 0.85 * r,
            (dy <= 0.75 * r) & (dy >= 1.8 * abs(dx) - r),
            (np.minimum(abs(dy), abs(dx)) <= 0.3 * r) & (np.maximum(abs(dy), abs(dx)) <= r),
        )[kind]
        image = draw.normal(0.25, 0.07, size=(size, size))
        for _ in range(3):  # lines that mean nothing
            a, b = draw.normal(size=2)
            c = draw.uniform(0, size, size=2)
            far = abs(a * (rows - c[0]) + b * (columns - c[1])) / np.hypot(a, b)
            image = np.where(far < 0.6, draw.uniform(0.4, 0.9), image)
        light = draw.uniform(0.5, 0.9) + draw.normal(0, 0.05, size=(size, size))
        images[i] = np.where(masks[i], light, image).clip(0, 1)
    return torch.from_numpy(images)[:, None], torch.from_numpy(y), torch.from_numpy(masks)


def stripes(generator: torch.Generator, test: bool) -> Split:
    """A striped disc in 32 by 32 pixels of noise, with its mask; the direction is the class."""
    n = 600 if test else 2400
    draw = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    y, size = draw.integers(4, size=n), 32
    rows, columns = np.mgrid[:size, :size]
    images, masks = np.empty((n, size, size), dtype=np.float32), np.empty((n, size, size), bool)
    for i, kind in enumerate(y):
        r = draw.uniform(5, 8)
        cy, cx = draw.uniform(r, size - 1 - r, size=2)
        masks[i] = (rows - cy) ** 2 + (columns - cx) ** 2 <= r**2
        along = (rows, columns, (rows + columns) / 2**0.5, (rows - columns) / 2**0.5)[kind]
        waves = 0.5 + 0.35 * np.sin(2 * np.pi * (along / 4 + draw.uniform()))
        image = np.where(masks[i], waves, 0.5) + draw.normal(0, 0.1, size=(size, size))
        images[i] = image.clip(0, 1)
    return torch.from_numpy(images)[:, None], torch.from_numpy(y), torch.from_numpy(masks)


def pairs(generator: torch.Generator, test: bool) -> Split:
    """Each token is a pair of a key and a value; the last asks for the value of one key.

    The mask is the one token that holds it.
    """
    n = 600 if test else 12000
    keys = torch.rand(n, SYMBOLS, generator=generator).argsort(1)
    values = torch.randint(SYMBOLS, (n, SYMBOLS), generator=generator)
    asked = torch.randint(SYMBOLS, (n, 1), generator=generator)
    ids = torch.cat([keys * SYMBOLS + values, SYMBOLS**2 + keys.gather(1, asked)], 1)
    mask = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, asked, True)
    return ids, SYMBOLS**2 + values.gather(1, asked)[:, 0], mask


# Training ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a task is made."""

    name: str
    network: Callable[[], nn.Module]
    data: Callable[[torch.Generator, bool], Split]
    epochs: int
    rate: float
    patch: int
    fill: Any = "mean"
    bounds: tuple[float, float] = (0.0, 1.0)
    decay: float = 0.01


RECIPES = {
    "cnn": Recipe("plain CNN on scikit-learn's digits", plain_cnn, digits, 12, 2e-3, 1),
    "residual": Recipe("residual network on shapes", Residual, shapes, 4, 4e-3, 4),
    "vit": Recipe("vision transformer on striped discs", vision_transformer, stripes, 10, 2e-3, 4),
    "signal": Recipe("1-d CNN on mnist1d", signal_cnn, mnist1d, 15, 2e-3, 2, bounds=(-5.0, 5.0)),
    "tokens": Recipe("copying language model on pairs", Copying, pairs, 6, 4e-3, 1),
}


def make(kind: str, seed: int, samples: int, quick: bool = False) -> Task:
    """Train a network, and take test samples for it.

    Args:
        kind: One of ``RECIPES``.
        seed: Of weights, order and generated data.
        samples: How many are explained.
        quick: Train next to nothing; for tests.
    """
    recipe = RECIPES[kind]
    generator = torch.Generator().manual_seed(seed)
    x, y, _ = recipe.data(generator, False)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = recipe.network().train()
        _train(model, x, y, recipe, 1 if quick else recipe.epochs, generator)
    model.eval().requires_grad_(False)
    x, y, masks = recipe.data(torch.Generator().manual_seed(1000 + seed), True)
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x.split(200)])
    # As many of each class as there are, in a drawn order; also those that are predicted wrongly.
    chosen = torch.randperm(len(x), generator=generator)[:samples]
    return Task(
        recipe.name,
        kind,
        model,
        x[chosen],
        found[chosen],
        None if masks is None else masks[chosen],
        float((found == y).float().mean()),
        recipe.patch,
        recipe.fill,
        recipe.bounds,
    )


def _train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    epochs: int,
    generator: torch.Generator,
) -> None:
    batch = 64 if len(x) < 10000 else 128
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps + 1)
    done = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            if len(rows) < batch or done >= steps:
                continue
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
