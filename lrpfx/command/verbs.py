"""What each command does: explain, coverage, report."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lrpfx.command.sources import PICTURES, Pixels, batches, find_images, load_model, pixels_for
from lrpfx.composites import EpsilonGammaBox
from lrpfx.coverage import coverage
from lrpfx.errors import InputError, LrpError
from lrpfx.explain import Explainer
from lrpfx.explanation import Explanation
from lrpfx.heatmap import heatmap
from lrpfx.plan import RulesLike

_SHAPE = (3, 224, 224)


def run_explain(asked: Namespace) -> int:
    """A picture of each image."""
    paths = find_images(asked.image)
    model = _model(asked)
    pixels = pixels_for(asked.model, asked.size, asked.gray, asked.normalize)
    out = Path(asked.out)
    folder = len(paths) > 1 or Path(asked.image).is_dir()
    if folder:
        if out.suffix in PICTURES and not out.is_dir():
            raise InputError(
                f"--out {out} is one picture, and {asked.image} is a folder of images.",
                fix=f"give a folder, such as --out {out.with_suffix('')}.",
            )
        _make(out)
    elif out.suffix == "":
        out = out.with_suffix(".png")
    pictures = _pictures(paths, out, folder)
    explainer = None
    noted: set[str] = set()
    done = 0
    for number, some in enumerate(batches(paths, asked.batch)):
        images = torch.stack([pixels.read(path) for path in some])
        inputs = pixels.normalize(images)
        if explainer is None:
            with _told("capturing the model"):
                explainer = Explainer(model, inputs, _rules(asked, pixels))
        explanation = explainer(inputs, asked.target, ledger=False)
        for note in explanation.report.notes:
            if note not in noted:
                noted.add(note)
                print(f"lrpfx: note: {note}", file=sys.stderr)
        if asked.save:
            _make(Path(asked.save))
            explanation.save(Path(asked.save) / f"batch_{number}.npz")
        for i, path in enumerate(some):
            picture = pictures[path]
            said = _said(explanation, i)
            heatmap(
                explanation.relevance[i : i + 1],
                inputs=images[i : i + 1],
                titles=[f"{path.name}: {said}"],
                path=picture,
                clip=asked.clip,
                overlay=asked.overlay,
            )
            print(f"{path}\t{said}\t{picture}")
        done += len(some)
        _progress(done, len(paths))
    return 0


def run_coverage(asked: Namespace) -> int:
    """The table of rules; 1 if an op has none."""
    model = _model(asked, quiet=True)
    with _told("capturing the model"):
        report = coverage(model, _random(asked), _rules(asked, None))
    print(report)
    return 1 if report.unsupported else 0


def run_report(asked: Namespace) -> int:
    """The report of one explanation, as text or as a page."""
    model = _model(asked)
    pixels = pixels_for(asked.model, asked.size, asked.gray, asked.normalize)
    if asked.image is None:
        print("lrpfx: no --image: random numbers are explained", file=sys.stderr)
        inputs, bounds = _random(asked), None
    else:
        if Path(asked.image).is_dir():
            raise InputError("report explains one image.", fix="give one of the folder.")
        inputs = pixels.normalize(pixels.read(find_images(asked.image)[0])[None])
        bounds = pixels
    with _told("capturing the model"):
        explainer = Explainer(model, inputs, _rules(asked, bounds))
    report = explainer(inputs, asked.target).report
    print(report.summarize(asked.depth) if asked.depth else report)
    print(report.leaks())
    if asked.html:
        try:
            report.to_html(asked.html)
        except OSError as error:
            raise InputError(
                f"{asked.html} cannot be written: {error}", fix="give a path in a folder that is."
            ) from error
        print(f"wrote {asked.html}")
    return 0


def _model(asked: Namespace, quiet: bool = False) -> nn.Module:
    with _told(f"loading {asked.model}"):
        model = load_model(asked.model, asked.weights)
    random = asked.weights == "none" and asked.model.startswith(("torchvision:", "timm:"))
    if random and not quiet:
        print(
            "lrpfx: --weights none: the weights are random, and so is what is explained",
            file=sys.stderr,
        )
    return model


def _rules(asked: Namespace, pixels: Pixels | None) -> RulesLike:
    """The composite by its name; the one that takes bounds gets those of the pixels."""
    if asked.rules in ("epsilon_gamma_box", "EpsilonGammaBox") and pixels is not None:
        return EpsilonGammaBox(*pixels.bounds())
    rules: RulesLike = asked.rules
    return rules


def _random(asked: Namespace) -> Tensor:
    shape = (1, *(asked.shape or _SHAPE))
    return torch.randint(0, asked.ids, shape) if asked.ids else torch.rand(shape)


def _said(explanation: Explanation[Tensor], i: int) -> str:
    """What was explained of the sample, and its value."""
    value = explanation.seed[i].sum().item() if isinstance(explanation.seed, Tensor) else 0.0
    target = explanation.target
    return f"{value:.4g}" if target is None else f"class {int(target[i])}: {value:.4g}"


def _pictures(paths: Sequence[Path], out: Path, folder: bool) -> dict[Path, Path]:
    """Where the picture of each image is written: never onto an image."""
    stems = [path.stem for path in paths]
    unique = len(set(stems)) == len(stems)
    pictures = {
        path: (out / f"{path.stem if unique else path.name}.png" if folder else out)
        for path in paths
    }
    taken = {path.resolve() for path in paths} & {p.resolve() for p in pictures.values()}
    if taken:
        raise InputError(
            f"--out {out} would overwrite {min(taken).name}.", fix="give another file or folder."
        )
    return pictures


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} is no folder: {error}", fix="give another one.") from error


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say on a terminal what takes its time, and how long it took."""
    shown = sys.stderr.isatty()
    began = time.monotonic()
    if shown:
        print(f"lrpfx: {what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    except LrpError:
        if shown:
            print(file=sys.stderr)
        raise
    if shown:
        print(f" {time.monotonic() - began:.1f} s", file=sys.stderr)


def _progress(done: int, total: int) -> None:
    if total > 1:
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        print(f"lrpfx: {done} of {total} images", end=end, file=sys.stderr, flush=True)
