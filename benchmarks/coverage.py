"""Which models lrpfx explains, measured: ``python -m benchmarks.coverage [ZOO] [--only NAME]``.

A zoo is torchvision, timm or transformers; its models are listed in ``benchmarks/zoos.py``. All
have random weights, drawn so that every part matters (``randomize``). One Markdown table row is
printed per model, and a whole run replaces the zoo's section of docs/coverage.md; ``--only NAME
--write`` renews rows of it:

- captured: the model became a graph;
- ruled: every op of it that depends on the input has a rule;
- forward: largest difference to the model's own output, relative to its largest value;
- ledger: relevance that is neither at the inputs nor booked as absorbed, relative to what moved;
- oracle: what the relevance was held against, and the relative error (Euclidean norm);
- agreed: whether forward, ledger and oracle are within their tolerances;
- nodes with a rule; seconds for all of it.

Relevance is held against others in float64, under the default rules unless said otherwise:

- gradient: LRP-0 (``EpsilonAll(epsilon=0)``) against gradient times input of the model itself,
  where the network is piecewise linear; biases stay in the denominators, so the two are equal;
- batch: a sample in a batch of two against the same sample alone;
- multiplier: the form in which edges carry multipliers and no ledger is kept, against the plain;
- layout: inputs in channels_last, or with gaps in memory, against the same in one piece;
- derivative: that of the relevance by inputs and parameters, along a random direction, against
  central differences; of models that are explained within a second ("rounded": of models that
  round to float32 inside, which the differences see);
- explicit: as ``Explainer.compile(backend="eager")`` gives it, of the same models;
- float32: the relevance in float32 against that in float64;
- "batch float32" in the place of all: for models that cannot run in float64, or round inside.
"""

from __future__ import annotations

import argparse
import gc
import platform
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lrpfx
from benchmarks.zoos import ZOOS, Case
from lrpfx.capture.forms import tensors_in

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"

#: What counts as equal. Forward and ledger are in float32, and so is one side of "float32".
FORWARD, LEDGER = 1e-3, 1e-4
TOLERANCES = {"gradient": 1e-9, "batch": 1e-6, "multiplier": 1e-6, "layout": 1e-6}
TOLERANCES |= {"explicit": 1e-6}
TOLERANCES |= {
    "derivative": 1e-2,
    "derivative, rounded": 1e-2,
    "float32": 1e-1,
    "batch float32": 1e-1,
}

#: Seconds that one explanation may take for its derivative to be measured, too.
SMALL = 1.0
#: Steps of the differences, tried in turn: round-off wants large ones, kinks want small ones, and
#: a model that rounds to float32 inside wants very large ones.
STEPS = (1e-7, 1e-9, 1e-6, 1e-8, 1e-10, 1e-5, 1e-4, 1e-3, 3e-4, 3e-5)

#: Kinds of op for which LRP-0 is gradient times input.
PIECEWISE_LINEAR = {"conv", "linear", "batch_norm", "avg_pool", "reduction", "interpolate", "sum"}
PIECEWISE_LINEAR |= {"shift", "scale", "relu", "leaky_relu", "prelu", "abs", "max_pool", "max"}
PIECEWISE_LINEAR |= {"reshape", "cat", "pad", "where", "scatter", "fourier", "solve"}


@torch.no_grad()
def randomize(model: nn.Module, inputs: Any) -> nn.Module:
    """Draw what initialisation leaves at a constant, so that no part is idle or an identity.

    Biases, gains of norms, layer scales, position embeddings and heads that start at zero. Batch
    norm gets the statistics of ``inputs``, somewhat off: without, deep networks of random weights
    amplify the round-off of float32 to the size of the output.
    """
    for name, parameter in model.named_parameters():
        if not parameter.numel() or parameter.min() != parameter.max():
            continue
        constant = parameter.flatten()[0].item()
        if constant and abs(constant) > 1e-2:  # a gain, or a temperature
            parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
        elif constant or (parameter.ndim < 2 and "bias" not in name and "token" not in name):
            parameter.uniform_(0.3, 0.7)  # a layer scale, or a gate that starts shut
        else:
            parameter.normal_(0, 0.1 if parameter.ndim == 1 else 0.02)
    # A row of zeros makes logits that are exactly zero, where LRP-0 has nothing to share by.
    for embedding in [m for m in model.modules() if isinstance(m, nn.Embedding)]:
        if embedding.padding_idx is not None:
            embedding.weight[embedding.padding_idx].normal_(0, 0.02)
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [m.register_forward_hook(_draw_statistics) for m in norms if m.track_running_stats]
    if hooks:
        model(*_positional(inputs), **_keywords(inputs))
    for hook in hooks:
        hook.remove()
    return model


def _draw_statistics(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Set a batch norm's statistics to those of its input, somewhat off; return its new output."""
    x = inputs[0].transpose(0, 1).flatten(1)
    var = x.var(1, correction=0)
    var = var.clamp_min(0.1 * var.mean().item() + 1e-3)
    norm.running_mean.copy_(x.mean(1) + 0.5 * var.sqrt() * torch.randn_like(var))
    norm.running_var.copy_(var * torch.empty_like(var).uniform_(1, 2))
    return norm.forward(*inputs)


@dataclass
class Row:
    """One model of the table, filled in as far as it came."""

    model: str
    captured: str = ""
    ruled: str = ""
    forward: str = ""
    ledger: str = ""
    oracle: str = ""
    agreed: str = "no"
    nodes: str = ""
    seconds: str = ""
    reason: str = ""

    COLUMNS: ClassVar = "model captured ruled forward ledger oracle agreed nodes seconds".split()

    def __str__(self) -> str:
        return "| " + " | ".join(getattr(self, column) for column in self.COLUMNS) + " |"


HEAD = ["| " + " | ".join(Row.COLUMNS) + " |", "|" + " --- |" * len(Row.COLUMNS)]


def measure(case: Case) -> Row:
    """One row of the table."""
    row = Row(case.name)
    start = time.perf_counter()
    try:
        _measure(case, row)
    except lrpfx.errors.UnsupportedOpError as error:
        row.captured, row.ruled = "yes", "no"
        ops = Counter(place.split(" at ")[0] for place in error.where)
        row.reason = "no rule for " + ", ".join(f"{op} ({n}x)" for op, n in ops.items())
    except Exception as error:  # whatever a model or the library raises is a miss with a reason
        row.reason = " / ".join([f"{type(error).__name__}: {_first_line(error)}", *_places(error)])
        row.captured = row.captured or "no"
    row.seconds = f"{time.perf_counter() - start:.1f}"
    gc.collect()
    return row


def _measure(case: Case, row: Row) -> None:
    torch.manual_seed(0)
    model, inputs = case.make(), case.inputs(2)
    randomize(model, case.inputs(8))
    with torch.no_grad():
        output = model(*_positional(inputs), **_keywords(inputs))
    target, expected = target_for(case.score, output), tensors_in(output)
    explainer = lrpfx.Explainer(model, inputs)
    row.captured = row.ruled = "yes"
    explanation = explainer(inputs, target, ledger=True)
    report = explanation.report
    got = tensors_in(explanation.output)
    forward = max(map(_error_of_largest, got, expected))
    moved = max(abs(r.relevance_in or 0.0) for r in report.rows)
    ledger = abs(report.unaccounted or 0.0) / max(moved, 1e-30)
    row.forward, row.ledger, row.nodes = f"{forward:.0e}", f"{ledger:.0e}", str(len(report.rows))
    if not forward < FORWARD:
        row.reason = f"forward differs by {forward:.0e}"
    elif not ledger < LEDGER:
        row.reason = f"the ledger is open by {ledger:.0e}"
    single = relevance_of(explanation)
    linear = {r.kind for r in report.rows} <= PIECEWISE_LINEAR and not _holds_statistics(explainer)
    del explainer, explanation, got
    errors = _in_doubles(model, inputs, target, single, linear)
    if errors is None:
        together, alone, _ = _batch(model.float(), inputs, target)
        errors = {"batch float32": _relative_error([t[-1:] for t in together], alone)}
    row.oracle = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    missed = [f"{k} by {e:.0e}" for k, e in errors.items() if not e < TOLERANCES[k]]
    row.reason = "; ".join(filter(None, [row.reason, *missed]))
    row.agreed = "no" if row.reason else "yes"


# -- oracles --------------------------------------------------------------------------------------


def _gradient(model: nn.Module, inputs: Any, target: Callable[[Any], Tensor]) -> dict[str, float]:
    """LRP-0 against gradient times input of the model itself."""
    rules = lrpfx.composites.EpsilonAll(epsilon=0.0)
    got = relevance_of(lrpfx.explain(model, inputs, target, rules=rules, ledger=True))
    leaves = _mapped(lambda t: t.requires_grad_() if t.is_floating_point() else t, inputs)
    output = model(*_positional(leaves), **_keywords(leaves))
    explained = [t for t in tensors_in(leaves) if t.requires_grad]
    grads = torch.autograd.grad(target(output).sum(), explained)
    expected = [(g * t).detach() for g, t in zip(grads, explained, strict=True)]
    return {"gradient": _relative_error(got, expected)}


def _in_doubles(
    model: nn.Module,
    inputs: Any,
    target: Callable[..., Tensor],
    single: Sequence[Tensor],
    linear: bool,
) -> dict[str, float] | None:
    """Errors by oracle in float64; None for a model that cannot run so, or not to full precision.

    Some make float32 tensors of their own. Others round to float32 on the way, where differences
    of 1e-16 flip a bit now and then, and are refused as not computing what the model computes.

    Args:
        model: With its parameters in float32.
        inputs: Two samples, in float32.
        target: See ``target_for``.
        single: The relevance of the inputs in float32.
        linear: Whether the network is piecewise linear.
    """
    inputs = _mapped(_double, inputs)
    try:
        with torch.no_grad():
            model.double()(*_positional(inputs), **_keywords(inputs))
    except RuntimeError:
        return None
    try:
        errors = _gradient(model, inputs, target) if linear else {}
        together, alone, explainer = _batch(model, inputs, target)
    except lrpfx.errors.CaptureError:
        return None
    errors["batch"] = _relative_error([t[-1:] for t in together], alone)
    errors["float32"] = _relative_error(single, together)
    sample = _last(inputs)

    def explained(inputs: Any, **options: Any) -> list[Tensor]:
        return relevance_of(explainer(inputs, lambda out: target(out, 1), **options))

    start = time.perf_counter()
    errors["multiplier"] = _relative_error(fast := explained(sample, ledger=False), alone)
    seconds = time.perf_counter() - start
    laid_out = _mapped(_other_layout, sample)
    errors["layout"] = _relative_error(explained(laid_out, ledger=False), fast)
    if seconds < SMALL:
        rounded = any(_is_float32(n.meta.get("val")) for n in explainer._engine.module.graph.nodes)
        name = "derivative, rounded" if rounded else "derivative"
        errors[name] = _derivative(model, explainer, sample, lambda out: target(out, 1))
        explainer.compile(backend="eager")
        explained(sample, ledger=False)  # makes the graphs
        errors["explicit"] = _relative_error(explained(sample, ledger=False), alone)
    return errors


def _batch(
    model: nn.Module, inputs: Any, target: Callable[..., Tensor]
) -> tuple[list[Tensor], list[Tensor], lrpfx.Explainer]:
    """Relevance of the batch, that of its last sample alone, and what explains such samples."""
    explainer = lrpfx.Explainer(model, inputs)
    together = relevance_of(explainer(inputs, target, ledger=True))
    sample = _last(inputs)
    if any("captured for a batch of" in note for note in explainer.report.notes):
        explainer = lrpfx.Explainer(model, sample)
    alone = explainer(sample, lambda out: target(out, 1), ledger=True)
    return together, relevance_of(alone), explainer


def _last(inputs: Any) -> Any:
    """The last sample of the batch."""
    return _mapped(lambda t: t[1:] if t.ndim else t, inputs)


def _is_float32(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _other_layout(t: Tensor) -> Tensor:
    """The same values in another order in memory."""
    if t.ndim == 4 and t.shape[1] > 1:
        return t.contiguous(memory_format=torch.channels_last)
    return torch.stack([t, t], -1)[..., 0]


def _derivative(
    model: nn.Module,
    explainer: lrpfx.Explainer,
    sample: Any,
    target: Callable[[Any], Tensor],
) -> float:
    """The derivative of a random projection of the relevance, against central differences."""
    sample = _mapped(lambda t: t.clone().requires_grad_(t.is_floating_point()), sample)
    variables = [t for t in tensors_in(sample) if t.requires_grad]
    variables += [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    directions = [torch.randn_like(v) * v.detach().square().mean().sqrt() for v in variables]
    explanation = explainer(sample, target, create_graph=True, ledger=False)
    relevance = [t for t in pytree.tree_leaves(explanation.relevance) if isinstance(t, Tensor)]
    weights = [torch.randn_like(r) for r in relevance]

    def projected(relevance: Sequence[Tensor]) -> Tensor:
        return torch.stack([(r * w).sum() for r, w in zip(relevance, weights, strict=True)]).sum()

    grads = torch.autograd.grad(projected(relevance), variables, allow_unused=True)
    pairs = zip(grads, directions, strict=True)
    exact = sum(float((g * u).sum()) for g, u in pairs if g is not None)

    @torch.no_grad()
    def moved(by: float) -> float:
        for v, u in zip(variables, directions, strict=True):
            v.add_(u, alpha=by)
        value = projected(relevance_of(explainer(sample, target, ledger=False)))
        for v, u in zip(variables, directions, strict=True):
            v.add_(u, alpha=-by)
        return float(value)

    found = float("inf")
    for h in STEPS:
        difference = (moved(h) - moved(-h)) / (2 * h)
        found = min(found, abs(difference - exact) / max(abs(exact), 1e-300))
        if found < 1e-3:
            break
    return found


def target_for(score: Callable[[Any], Any], expected: Any) -> Callable[..., Tensor]:
    """What to explain: the strongest class, or a random projection of outputs of other shapes.

    The target takes an output and which sample of the batch it begins with.
    """
    first = next(t for t in tensors_in(score(expected)) if t.is_floating_point())
    classes = first.argmax(1) if first.ndim == 2 else None

    def probe(output: Any, begin: int = 0) -> Tensor:
        found = [t for t in tensors_in(score(output)) if t.is_floating_point()]
        if classes is not None:
            n = len(found[0])
            return found[0][torch.arange(n), classes[begin : begin + n]]
        total = torch.zeros(())
        for t in found[:4]:
            if t.ndim and t.requires_grad:
                g = torch.Generator().manual_seed(t[0].numel())
                total = total + t.flatten(1) @ torch.randn(t[0].numel(), generator=g).to(t)
        return total

    return probe


def relevance_of(explanation: lrpfx.Explanation) -> list[Tensor]:
    """Relevance of the explained inputs."""
    by_input = pytree.tree_leaves(explanation.relevance)
    return [t.detach() for t in by_input if isinstance(t, Tensor)]


def _holds_statistics(explainer: lrpfx.Explainer) -> bool:
    """Whether a norm written by hand is a constant for relevance, though not for gradients."""
    return any(lrpfx.ops.graph.HELD in n.meta for n in explainer._engine.module.graph.nodes)


def _relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    a, b = (torch.cat([t.double().flatten() for t in ts]) for ts in (got, expected))
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def _error_of_largest(got: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point() or not expected.numel():
        return 0.0 if torch.equal(got, expected) else float("inf")
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


# -- inputs: a tensor, a tuple, or a dict ---------------------------------------------------------


def _positional(inputs: Any) -> tuple[Any, ...]:
    return () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)


def _keywords(inputs: Any) -> dict[str, Any]:
    return inputs if isinstance(inputs, dict) else {}


def _mapped(change: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    return pytree.tree_map(lambda t: change(t) if isinstance(t, Tensor) else t, inputs)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


# -- the page -------------------------------------------------------------------------------------


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return lines[0]


def _places(error: Exception) -> list[str]:
    return [" ".join(place.split()) for place in getattr(error, "where", ())[:2]]


def _cell(text: str) -> str:
    """Text without paths of this machine, and without what Markdown would read as its own."""
    text = re.sub(r"\S*/(?:site-packages|lib)/", "", text)
    return text.replace("|", "\\|").replace("<", "&lt;")[:300]


def section(zoo: str, rows: Sequence[Row]) -> list[str]:
    """The zoo's part of the page."""
    misses = [row for row in rows if row.agreed != "yes"]
    part = [f"## {zoo}", "", summary(zoo, rows), "", *HEAD, *map(str, rows)]
    if misses:
        part += ["", f"Misses ({len(misses)}):", ""]
        part += [f"- {row.model}: {_cell(row.reason)}" for row in misses]
    return [*part, ""]


def rows_of(page: str, zoo: str) -> dict[str, Row]:
    """The rows that stand in the zoo's section, by model."""
    found: dict[str, Row] = {}
    part = page.partition(f"\n## {zoo}\n")[2].partition("\n## ")[0]
    for line in part.splitlines():
        if line.startswith("| ") and not line.startswith(("| model |", "| --- |")):
            row = Row(*line.strip("|").strip().split(" | "))
            found[row.model] = row
        elif line.startswith("- "):
            model, _, reason = line[2:].partition(": ")
            found[model].reason = reason.replace("\\|", "|").replace("&lt;", "<")
    return found


def summary(zoo: str, rows: Sequence[Row]) -> str:
    """How many of how many, and with what."""
    good = sum(row.agreed == "yes" for row in rows)
    gradient = sum("gradient" in row.oracle for row in rows)
    versions = [f"{name} {sys.modules[name].__version__}" for name in dict.fromkeys(("torch", zoo))]
    return (
        f"{good} of {len(rows)} agreed, {gradient} of them held against gradient times input. "
        f"{', '.join(versions)}, {platform.machine()}, {torch.get_num_threads()} thread(s); "
        "seconds are of one run."
    )


def replace_section(page: str, zoo: str, part: Sequence[str]) -> str:
    """The page with one section new and the others as they were, in the order of ``ZOOS``."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    sections = {p.split("\n", 1)[0].removeprefix("## "): p for p in parts[1:]}
    sections[zoo] = "\n".join(part) + "\n"
    assert __doc__ is not None
    body = __doc__.split("\n\n", 1)[1].strip().replace("``", "`")
    head = (
        f"# Coverage\n\nMade by `python -m benchmarks.coverage`, one section per run.\n\n{body}\n"
    )
    return head + "".join("\n" + sections[z].rstrip("\n") + "\n" for z in ZOOS if z in sections)


def main() -> int:
    """Print the table, write it, and fail if a model is not explained."""
    parser = argparse.ArgumentParser(description="Which models lrpfx explains, measured.")
    parser.add_argument("zoo", nargs="?", default="torchvision", choices=list(ZOOS))
    parser.add_argument("--only", default="", help="a regular expression in the model's name")
    parser.add_argument("--write", action="store_true", help="with --only: renew these rows")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print("\n".join(HEAD))
    rows, names = [], []
    for case in ZOOS[arguments.zoo]():
        names.append(case.name)
        if re.search(arguments.only, case.name):
            row = measure(case)
            rows.append(row)
            print(f"{row}  {_cell(row.reason)}", flush=True)
    print(summary(arguments.zoo, rows))
    if arguments.write or not arguments.only:
        page = PAGE.read_text() if PAGE.exists() else ""
        known = rows_of(page, arguments.zoo) | {row.model: row for row in rows}
        part = section(arguments.zoo, [known[name] for name in names if name in known])
        PAGE.write_text(replace_section(page, arguments.zoo, part))
    return 0 if all(row.agreed == "yes" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
