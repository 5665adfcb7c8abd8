"""What the command line names -> models, weights and images."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrpfx.capture import first_line
from lrpfx.errors import InputError, some

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
#: How the names of pictures end that are written.
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_model(spec: str, weights: str) -> nn.Module:
    """The model of ``library:name``, ``path.py:name`` or ``package.module:name``, in eval mode.

    Args:
        spec: As the command line has it.
        weights: "none", "default" (those of the library, which it downloads), or a file with a
            state dict.

    Raises:
        InputError: There is no such model, or the weights do not fit it.
    """
    library, colon, name = spec.rpartition(":")
    if not colon or not library or not name:
        raise InputError(
            f"--model {spec!r} names no model.",
            fix="give torchvision:resnet18, timm:convnext_tiny, net.py:Net or package.module:Net.",
        )
    known = library in ("torchvision", "timm")
    if weights == "default" and not known:
        raise InputError(
            "--weights default is for models of torchvision and timm.",
            fix="give a file with the state dict, or none.",
        )
    if library == "torchvision":
        model = _torchvision(name, weights == "default")
    elif library == "timm":
        model = _timm(name, weights == "default")
    else:
        model = _own(library, name)
    if weights not in ("none", "default"):
        _load_weights(model, weights)
    return model.eval()


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    models = _library("torchvision.models", "torchvision")
    if name not in models.list_models():
        raise _no_model("torchvision", name, models.list_models())
    return _made(lambda: models.get_model(name, weights="DEFAULT" if pretrained else None), name)


def _timm(name: str, pretrained: bool) -> nn.Module:
    timm = _library("timm", "timm")
    if not timm.is_model(name):
        raise _no_model("timm", name, timm.list_models())
    return _made(lambda: timm.create_model(name, pretrained=pretrained), name)


def _made(make: Callable[[], nn.Module], name: str) -> nn.Module:
    """What a library makes by a name; without a network its own weights cannot come."""
    try:
        return make()
    except Exception as error:  # a download may raise anything
        raise InputError(
            f"{name} cannot be made: {type(error).__name__}: {first_line(error)}",
            fix="download the weights where there is a network, and give their file as --weights; "
            "or --weights none, for the model without them.",
        ) from error


def _library(module: str, package: str) -> Any:
    try:
        try:
            return importlib.import_module(module)
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            # A wheel of torchvision beside another build of torch: declaring the ops of boxes is
            # enough, as no model that is explained calls them.
            for op in ("nms", "qnms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{op}", schema)
            return importlib.import_module(module)
    except Exception as error:  # a package of another build may raise anything
        raise InputError(
            f"{package} cannot be imported: {type(error).__name__}: {error}",
            fix=f"pip install {package}, from the index that torch came from.",
        ) from error


def _no_model(library: str, name: str, names: Sequence[str]) -> InputError:
    near = difflib.get_close_matches(name, names, n=3)
    return InputError(
        f"{library} has no model {name!r}.",
        fix=f"did you mean {' or '.join(near)}?" if near else f"see {library}'s list of models.",
    )


def _own(place: str, name: str) -> nn.Module:
    """A module, or what a class or function without arguments makes of it."""
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(spec.name, module)
            sys.path.insert(0, str(Path(place).resolve().parent))  # as `python path.py` does
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # whatever the user's file leads to
        raise InputError(
            f"{place} cannot be imported: {type(error).__name__}: {error}",
            fix="give a file such as net.py:Net, or an importable module such as package.net:Net.",
        ) from error
    if not hasattr(module, name):
        own = [n for n, v in vars(module).items() if _may_be_a_model(v, module.__name__)]
        near = difflib.get_close_matches(name, own, n=3)
        raise InputError(
            f"{place} has no {name!r}.",
            where=some([f"it has {n}" for n in own]),
            fix=f"did you mean {' or '.join(near)}?"
            if near
            else "name a module class, a function that returns a module, or a module.",
        )
    found = getattr(module, name)
    if not isinstance(found, nn.Module):
        try:
            found = found()
        except Exception as error:  # the function is the user's, and may raise anything
            raise InputError(
                f"{place}:{name}() fails: {type(error).__name__}: {error}",
                fix="name a function without arguments that returns the module.",
            ) from error
    if not isinstance(found, nn.Module):
        raise InputError(
            f"{place}:{name} is a {type(found).__name__}, not a module.",
            fix="name a module class, a function that returns a module, or a module.",
        )
    return found


def _may_be_a_model(value: Any, module: str) -> bool:
    """Whether it is a module, or a class or function that this file itself defines."""
    return isinstance(value, nn.Module) or (
        callable(value) and getattr(value, "__module__", None) == module
    )


def _load_weights(model: nn.Module, path: str) -> None:
    fix = "give a file that torch.save(model.state_dict(), path) wrote, or none."
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a missing, damaged or hostile file leads to
        reason = str(error).split(". ")[0].strip()
        raise InputError(
            f"--weights {path} cannot be read: {type(error).__name__}: {reason}", fix=fix
        ) from error
    for key in ("state_dict", "model"):  # as training scripts store it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise InputError(f"--weights {path} holds a {type(state).__name__}.", fix=fix)
    state = {str(k).removeprefix("module."): v for k, v in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise InputError(
            f"--weights {path} do not fit {type(model).__name__}.", where=some(lines), fix=fix
        ) from error


@dataclass(frozen=True)
class Pixels:
    """How an image becomes an input: cropped to a square, and (pixel - mean) / std per channel.

    Args:
        size: Of the square.
        channels: 1 or 3.
        mean: Per channel.
        std: Per channel.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def read(self, path: Path) -> Tensor:
        """The image (C, H, W) in 0..1: its shorter side scaled to the size, the middle cut out.

        Raises:
            InputError: It cannot be read.
        """
        from PIL import Image

        try:
            image = Image.open(path).convert("L" if self.channels == 1 else "RGB")
        except Exception as error:  # whatever a missing or damaged file leads to
            raise InputError(
                f"{path} cannot be read as an image: {error}",
                fix=f"give an image ({', '.join(_ENDINGS)}), or a folder of images.",
            ) from error
        scale = self.size / min(image.size)
        wide, high = (max(round(side * scale), self.size) for side in image.size)
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        values = np.asarray(image, dtype=np.float32) / 255
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(values))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in 0..1 as the model gets them."""
        mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and highest input, each (1, C, 1, 1)."""
        black, white = (torch.full((1, self.channels, 1, 1), v) for v in (0.0, 1.0))
        return self.normalize(black), self.normalize(white)


def pixels_for(spec: str, size: int, gray: bool, normalize: str) -> Pixels:
    """How images become inputs of the model; "auto" takes ImageNet's for torchvision and timm."""
    imagenet = normalize == "imagenet" or (
        normalize == "auto" and spec.startswith(("torchvision:", "timm:"))
    )
    channels = 1 if gray else 3
    if imagenet and not gray:
        return Pixels(size, channels, *_IMAGENET)
    return Pixels(size, channels, (0.0,) * channels, (1.0,) * channels)


def find_images(place: str) -> list[Path]:
    """The image, or those of a folder by name.

    Raises:
        InputError: There is none.
    """
    path = Path(place)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in _ENDINGS)
        if not found:
            raise InputError(
                f"{place} holds no images.", fix=f"give a folder with files {', '.join(_ENDINGS)}."
            )
        return found
    if not path.exists():
        raise InputError(f"there is no {place}.", fix="give an image, or a folder of images.")
    return [path]


def batches(paths: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    """The paths, so many at a time."""
    for start in range(0, len(paths), size):
        yield paths[start : start + size]
