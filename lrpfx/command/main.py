"""argv -> what is asked for, done; the exit code says how it went."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from lrpfx.command.verbs import run_coverage, run_explain, run_report
from lrpfx.composites import NAMED
from lrpfx.errors import LrpError

_EXAMPLES = """examples:
  lrpfx explain --model torchvision:resnet18 --weights default --image cat.jpg --out cat_map.png
  lrpfx explain --model net.py:Net --weights net.pt --image photos/ --out maps/ --overlay
  lrpfx coverage --model timm:convnext_tiny
  lrpfx report --model torchvision:resnet18 --html report.html

exit codes:
  0  done, and every op has a rule
  1  an error, which says what happened, where, and what to do; or `coverage` found ops without rule
  2  arguments that cannot be read
"""
_RULES = """a rule set by name. Which for what: epsilon_gamma or epsilon_plus_flat for convolutional
networks, attnlrp for transformers, epsilon_all for dense networks; by default as the model's layers
tell. All: """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code.

    Args:
        argv: Arguments without the program's name; by default those of the process.
    """
    arguments = _parser().parse_args(argv)
    torch.manual_seed(0)  # random weights and inputs are the same in every run
    try:
        code: int = arguments.run(arguments)
    except LrpError as error:
        print(f"lrpfx: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lrpfx: interrupted", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    from lrpfx import __version__

    parser = argparse.ArgumentParser(
        prog="lrpfx",
        description="Layer-wise Relevance Propagation: which input values a model's output is "
        "made of.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lrpfx {__version__}")
    verbs = parser.add_subparsers(metavar="explain | coverage | report", required=True)
    explain = _verb(verbs, "explain", run_explain, "Draw heatmaps of one image or of a folder.")
    _image(explain, required=True)
    explain.add_argument(
        "--out",
        default="relevance",
        metavar="PATH",
        help="picture to write (.png, .pdf, .svg); for several images a folder "
        "(default: relevance)",
    )
    explain.add_argument(
        "--clip",
        type=float,
        default=100.0,
        metavar="P",
        help="percentile of the relevance that has full colour; 99 shows weaker pixels, too",
    )
    explain.add_argument(
        "--overlay",
        action="store_true",
        help="draw the map over the image; --clip 99 makes more visible",
    )
    explain.add_argument(
        "--batch", type=_positive, default=8, metavar="N", help="images at a time (default: 8)"
    )
    explain.add_argument(
        "--save", metavar="FOLDER", help="also store each batch's explanation as .npz"
    )
    coverage = _verb(
        verbs, "coverage", run_coverage, "Tell which rule each op would get, and which have none."
    )
    _shape(coverage)
    report = _verb(
        verbs,
        "report",
        run_report,
        "Explain one input, and tell what became of the relevance, op by op.",
    )
    _image(report, required=False)
    _shape(report)
    report.add_argument("--html", metavar="FILE", help="write one page with a tree of modules")
    report.add_argument(
        "--depth", type=_positive, metavar="N", help="take ops together by N parts of their module"
    )
    return parser


def _verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: object,
          what: str) -> argparse.ArgumentParser:  # fmt: skip
    verb = verbs.add_parser(name, help=what, description=what)
    verb.set_defaults(run=run)
    verb.add_argument(
        "--model",
        required=True,
        metavar="SPEC",
        help="torchvision:NAME, timm:NAME, path.py:NAME or package.module:NAME, where NAME is a "
        "class or function without arguments, or a module",
    )
    verb.add_argument(
        "--weights",
        default="none",
        metavar="W",
        help="a file with a state dict; default: the library's own, downloaded; none: as the model "
        "is made, which for torchvision and timm is random (the default)",
    )
    verb.add_argument("--rules", metavar="NAME", help=f"{_RULES}{', '.join(NAMED)}")
    return verb


def _image(verb: argparse.ArgumentParser, *, required: bool) -> None:
    what = "an image, or a folder of images" if required else "an image (default: random numbers)"
    verb.add_argument("--image", required=required, metavar="PATH", help=what)
    verb.add_argument(
        "--target", type=int, metavar="CLASS", help="class to explain (default: the strongest)"
    )
    verb.add_argument(
        "--size", type=_positive, default=224, metavar="PIXELS", help="of the square (default: 224)"
    )
    verb.add_argument("--gray", action="store_true", help="one channel in place of three")
    verb.add_argument(
        "--normalize",
        choices=["auto", "imagenet", "none"],
        default="auto",
        help="pixels are 0 to 1; imagenet subtracts its mean and divides by its deviation; auto "
        "does so for torchvision and timm (default)",
    )


def _shape(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--shape",
        type=_sizes,
        metavar="C,H,W",
        help="shape of a random input, without the batch (default: 3,224,224)",
    )
    verb.add_argument(
        "--ids", type=_positive, metavar="V", help="inputs are token ids below V, of that shape"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(_positive, text.split(",")))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; write sizes and commas, such as 3,224,224"
        ) from error
