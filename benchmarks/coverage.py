"""Which models lrpfx explains, measured: ``python -m benchmarks.coverage [torchvision|timm]``.

Every model has random weights, randomised batch norm statistics, and a head that is not all zeros.
Printed per model, and written to docs/coverage-<zoo>.md:

- captured, and every live op ruled: else the first line of the error;
- forward: largest difference to the model's own output, relative to its largest value;
- ledger: relevance that is neither at the inputs nor booked as absorbed, relative to what moved;
- seconds for capture and set-up, and for one explanation; number of ruled nodes.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import lrpfx

#: What counts as equal, in float32.
FORWARD, LEDGER = 1e-3, 1e-4


def declare_missing_ops() -> None:
    """torchvision's wheel needs two ops of its own that a CPU build of torch does not load."""
    for name, arguments in (
        ("nms", "(Tensor dets, Tensor scores, float iou_threshold)"),
        ("qnms", "(Tensor dets, Tensor scores, float iou_threshold)"),
    ):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", f"{arguments} -> Tensor")


def torchvision_models() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """All classification models, each with the side length of its input."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        declare_missing_ops()
    from torchvision import models

    fixed = {"vit": 224, "swin": 224, "maxvit": 224, "inception": 299, "alexnet": 96}
    for name in models.list_models(module=models):
        side = next((s for start, s in fixed.items() if name.startswith(start)), 64)
        side = 518 if name == "vit_h_14" and side > 224 else side
        yield name, lambda name=name: models.get_model(name, weights=None), side


def timm_models() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """The smallest variant by name of each architecture family, as far as it is known small."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        declare_missing_ops()
    import timm

    small = ("tiny", "nano", "atto", "pico", "femto", "xxs", "xx_small", "small", "18", "26", "s0")
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        picked = next((n for word in small for n in names if word in n), names[0] if names else "")
        if picked:
            side = timm.get_pretrained_cfg(picked).input_size[-1]
            yield picked, lambda n=picked: timm.create_model(n, pretrained=False), min(side, 256)


def randomize(model: nn.Module) -> nn.Module:
    """Statistics off their defaults, and nothing left at zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return model.eval()


def measure(name: str, make: Callable[[], nn.Module], side: int) -> dict[str, str]:
    """One row of the table."""
    row = {"model": name, "captured": "", "forward": "", "ledger": "", "ok": "no"}
    try:
        torch.manual_seed(0)
        model = randomize(make())
        x = torch.randn(1, 3, side, side)
        start = time.perf_counter()
        explainer = lrpfx.Explainer(model, x)
        ready = time.perf_counter()
        explanation = explainer(x)
        done = time.perf_counter()
        with torch.no_grad():
            expected = model(x)
    except (lrpfx.errors.LrpError, RuntimeError, ValueError, TypeError) as error:
        row["captured"] = str(error).splitlines()[0][:90]
        return row
    output = explanation.output
    if not isinstance(output, torch.Tensor):
        output, expected = output[0], expected[0]
    forward = ((output - expected).abs().max() / expected.abs().max()).item()
    report = explanation.report
    moved = max(abs(r.relevance_in or 0.0) for r in report.rows)
    ledger = abs(report.unaccounted or 0.0) / max(moved, 1e-30)
    row.update(
        captured="yes",
        forward=f"{forward:.0e}",
        ledger=f"{ledger:.0e}",
        ok="yes" if forward < FORWARD and ledger < LEDGER else "no",
        rules=report.rules.split(" ")[0],
        nodes=str(len(report.rows)),
        setup=f"{ready - start:.1f}",
        explain=f"{done - ready:.2f}",
    )
    return row


def main() -> int:
    """Print the table, write it, and fail if a model is not explained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoo", nargs="?", default="torchvision", choices=["torchvision", "timm"])
    parser.add_argument("--only", default="", help="names that contain this")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    zoo = torchvision_models() if arguments.zoo == "torchvision" else timm_models()
    columns = ["model", "captured", "rules", "forward", "ledger", "ok", "nodes", "setup", "explain"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    print("\n".join(lines))
    good = total = 0
    for name, make, side in zoo:
        if arguments.only in name:
            row = measure(name, make, side)
            good, total = good + (row["ok"] == "yes"), total + 1
            lines.append("| " + " | ".join(row.get(c, "") for c in columns) + " |")
            print(lines[-1], flush=True)
    summary = (
        f"{good} of {total} models explained. torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads; seconds are of one noisy run."
    )
    print(summary)
    if not arguments.only:
        path = Path(__file__).parent.parent / "docs" / f"coverage-{arguments.zoo}.md"
        path.write_text("\n".join([f"# Coverage: {arguments.zoo}", "", summary, "", *lines, ""]))
    return 0 if good == total else 1


if __name__ == "__main__":
    sys.exit(main())
