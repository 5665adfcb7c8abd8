"""Explanations as ONNX files: ``python -m benchmarks.exported``.

A model of each family is exported with its relevance, and run by onnxruntime; minutes each, so that
``--only=swin_t --write`` writes one row and leaves the others as they are. Asked is whether
output and map are the Explainer's, how far both maps are from that in float64, how large the file
is beside the weights, and what a call costs beside one of the Explainer.

Where float32 itself is farther from float64 than the tolerance, two right programs may differ by
more than it. There the file's map has to be as near to float64 as the Explainer's own, and the
same program in float64 is held to its rounding.
"""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lrpfx
from benchmarks.coverage import randomize
from benchmarks.measure import DOCS, Table, command, interleaved, milliseconds, publish
from benchmarks.zoos import declare_missing_ops

declare_missing_ops()

COLUMNS = (
    "model",
    "weights, MB",
    "file, MB",
    "made in, CPU s",
    "lrpfx, ms",
    "onnxruntime, ms",
    "output differs",
    "map differs",
    "lrpfx from float64",
    "file from float64",
    "both in float64",
)
#: Relative to the largest value of the map; of programs in float64.
TOLERANCE, EXACT = 1e-5, 1e-10
#: How many times as far from float64 as the Explainer's map that of a file may be.
ROUNDING = 3.0
#: Of torchvision, a family each, with the side of its images.
IMAGES = {
    "alexnet": 64,
    "squeezenet1_1": 64,
    "vgg11": 64,
    "resnet18": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "googlenet": 64,
    "regnet_x_400mf": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "convnext_tiny": 64,
    "vit_b_32": 64,
    "efficientnet_b0": 64,
    "swin_t": 64,
    "densenet121": 64,
}
#: What a model is made with where its family has no form for such images.
OPTIONS: dict[str, dict[str, Any]] = {"vit_b_32": {"image_size": 64}}


class LastToken(nn.Module):
    """A language model's logits after the last position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits[:, -1]


def image_case(name: str) -> tuple[nn.Module, Any]:
    """A model of torchvision with random weights, and two images."""
    import torchvision

    if name == "maxvit_t":  # its windows of 7 want images of 224
        model = small_maxvit().eval()
    else:
        model = torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {})).eval()
    x = torch.randn(2, 3, IMAGES[name], IMAGES[name])
    with torch.no_grad():
        return randomize(model, x), x


def small_maxvit() -> nn.Module:
    """MaxViT-T with windows of 2, for images of 64."""
    from torchvision.models import MaxVit

    return MaxVit(
        input_size=(64, 64),
        stem_channels=64,
        block_channels=[64, 128, 256, 512],
        block_layers=[2, 2, 5, 2],
        head_dim=32,
        stochastic_depth_prob=0.2,
        partition_size=2,
    )


def bert() -> tuple[nn.Module, Any]:
    """A small BERT that classifies sentences."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    ids = torch.randint(5, 1000, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return transformers.BertForSequenceClassification(config).eval(), inputs


def llama() -> tuple[nn.Module, Any]:
    """A small Llama."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=1000,
    )
    model = LastToken(transformers.LlamaForCausalLM(config)).eval()
    return model, torch.randint(5, 1000, (2, 16))


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "BERT, 2 layers": bert,
    "Llama, 2 layers": llama,
    **{name: functools.partial(image_case, name) for name in IMAGES},
}


def add_row(made: Table, name: str, model: nn.Module, inputs: Any, budget: float) -> None:
    """Export one model, and run the file beside the Explainer."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    explainer = lrpfx.Explainer(model, inputs)
    tensors = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    target = torch.arange(len(tensors[0]))
    with tempfile.TemporaryDirectory() as folder:
        path, begun = Path(folder) / "model.onnx", time.process_time()
        lrpfx.export(explainer, path, inputs)
        took, size = time.process_time() - begun, path.stat().st_size
        session = onnxruntime.InferenceSession(path, options)
    names = [given.name for given in session.get_inputs()]
    feeds = {n: t.numpy() for n, t in zip(names, [*tensors, target], strict=True)}
    found = [torch.from_numpy(a) for a in session.run(None, feeds)]
    expected = explainer(inputs, target, ledger=False)
    output, relevance = _first(expected.output), _first(expected.relevance)
    exact = _Doubles(model, inputs, target)
    apart = [_apart(found[0], output), _apart(found[-1], relevance)]
    rounded = [_apart(t, exact.relevance) for t in (relevance, found[-1])]
    of_output = [_apart(t, exact.output) for t in (output, found[0])]
    held = exact.program_apart() if max(*apart, *rounded) > TOLERANCE else 0.0
    far = [file > ROUNDING * max(own, TOLERANCE) for own, file in (rounded, of_output)]
    if any(far) or held > EXACT:
        made.wrong.append(f"{name}: output and map differ by {apart[0]:.1e} and {apart[1]:.1e}")
    times = interleaved(
        {
            "lrpfx": lambda: explainer(inputs, target, ledger=False).relevance,
            "onnxruntime": lambda: session.run(None, feeds),
        },
        budget,
    )
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    made.add(
        name,
        f"{weights / 1e6:.1f}",
        f"{size / 1e6:.1f}",
        f"{took:.0f}",
        milliseconds(times["lrpfx"]),
        milliseconds(times["onnxruntime"]),
        *(f"{value:.0e}" for value in (*apart, *rounded)),
        f"{held:.0e}" if max(*apart, *rounded) > TOLERANCE else "-",
    )


class _Doubles:
    """An explanation in float64, by the Explainer and by a program."""

    def __init__(self, model: nn.Module, inputs: Any, target: Tensor) -> None:
        model = copy.deepcopy(model).double()
        self._target = target
        self._inputs = pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, inputs)
        self._explainer = lrpfx.Explainer(model, self._inputs)
        explanation = self._explainer(self._inputs, target, ledger=False)
        self.output = _first(explanation.output)
        self.relevance = _first(explanation.relevance)

    def program_apart(self) -> float:
        """How far the relevance of a program in float64 is from the Explainer's."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt2"
            lrpfx.export(self._explainer, path, self._inputs)
            program = torch.export.load(path).module()
        if isinstance(self._inputs, dict):
            found = program(**self._inputs, target=self._target)
        else:
            found = program(self._inputs, self._target)
        return _apart(_first(found[1]), self.relevance)


def _first(found: Any) -> Tensor:
    """The tensor itself, or the first in a mapping."""
    values = found.values() if isinstance(found, Mapping) else [found]
    return next(value for value in values if isinstance(value, Tensor))


def _apart(got: Tensor, expected: Tensor) -> float:
    got = got.to(expected.dtype)
    return float((got - expected).abs().max() / expected.abs().max())


def table(names: Sequence[str], budget: float) -> Table:
    """A row for each."""
    made = Table("Exported to ONNX", COLUMNS)
    for name in names:
        torch.manual_seed(0)
        try:
            add_row(made, name, *CASES[name](), budget)
        except Exception as error:  # the others are measured nevertheless
            made.wrong.append(f"{name}: {type(error).__name__}: {error}")
            print(made.wrong[-1], flush=True)
    made.notes.append(
        "Two samples with a class each, the default rules, random weights, float32. Differences "
        "are relative to the largest value. Some networks make more of rounding than "
        f"{TOLERANCE:.0e}: there lrpfx itself in float32 is as far from float64, and the "
        "last column has by how much program and lrpfx differ where both are in float64."
    )
    return made


def with_earlier(made: Table, page: str) -> None:
    """Add the rows of other models that the page has, in the order of the models.

    Args:
        made: The rows of some models.
        page: That of all benchmarks, with these columns or others.
    """
    section = page.partition("<!-- exported -->")[2].partition("<!-- end of exported -->")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    rows = {cells[0]: cells for cells in lines[2:]} if lines[:1] == [list(COLUMNS)] else {}
    rows.update((cells[0], list(cells)) for cells in made.rows)
    made.rows = [rows[name] for name in CASES if name in rows]
    made.notes.append("Models are measured one by one (`--only=`); the last command was")


def main() -> int:
    """Print the table."""
    options = command("exported", __doc__).parse_args()
    warnings.simplefilter("ignore")
    made = table([name for name in CASES if options.only in name], options.seconds)
    if options.only:
        with_earlier(made, (DOCS / "performance.md").read_text())
    return publish("exported", made, options.write)


if __name__ == "__main__":
    sys.exit(main())
