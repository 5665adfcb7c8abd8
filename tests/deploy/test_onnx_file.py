"""ONNX files: onnxruntime gives output and relevance as the Explainer does, at any batch size."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.deploy.onnx_file import _name_sizes
from lrpfx.errors import ExportError
from tests.oracle import zoo

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")
pytest.importorskip("onnxscript", reason="pip install -e '.[export]'")

#: Relative to the largest value of the map.
TOLERANCE = 1e-5


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    """What onnxruntime makes of the inputs, in the order of the file."""
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    feeds = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, feeds)]


def apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def perceptron() -> nn.Module:
    layers = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Softmax(1)
    return zoo.randomize(nn.Sequential(*layers)).eval()


def convolutional() -> nn.Module:
    """With what ends past the last stride, groups, both poolings, and a softmax at its end."""
    layers = [
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.Softmax(1),
    ]
    return zoo.randomize(nn.Sequential(*layers)).eval()


MODELS: dict[str, Any] = {
    "perceptron": (perceptron, (6,), "epsilon_plus"),
    "convolutional": (convolutional, (3, 18, 17), "epsilon_plus_flat"),
}


@pytest.fixture(
    scope="module", params=["convolutional", pytest.param("perceptron", marks=pytest.mark.nightly)]
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model's name, its Explainer and its file."""
    name = request.param
    model, shape, rules = MODELS[name]
    explainer = lrpfx.Explainer(model(), torch.randn(2, *shape), rules)
    path = tmp_path_factory.mktemp(name) / "model.onnx"
    lrpfx.export(explainer, path, torch.randn(2, *shape))
    return name, explainer, path


def test_a_file_gives_output_and_relevance_of_a_class_per_sample(written: Any) -> None:
    name, explainer, path = written
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path)
    assert [i.name for i in session.get_inputs()] == ["input", "target"]
    assert [o.name for o in session.get_outputs()] == ["output", "relevance"]
    for samples in (1, 2, 5):
        x, target = torch.randn(samples, *MODELS[name][1]), torch.arange(samples) % 4 - 2
        output, relevance = run(path, x, target)
        expected = explainer(x, target)
        assert apart(output, expected.output) < TOLERANCE
        assert apart(relevance, expected.relevance) < TOLERANCE


def test_a_class_that_is_out_of_range_is_refused_by_the_file(written: Any) -> None:
    name, _, path = written
    for target in (5, -6, -9):
        with pytest.raises(Exception, match="[Oo]ut of range"):
            run(path, torch.randn(2, *MODELS[name][1]), torch.tensor([0, target]))


def test_the_lines_of_the_page_run_it(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, explainer, path = written
    monkeypatch.chdir(path.parent)
    page = Path(lrpfx.__file__).parent.parent / "docs" / "export.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    (lines,) = (block for block in blocks if "onnxruntime" in block)
    x = torch.randn(2, *MODELS[name][1])
    there = SimpleNamespace(export=lambda *given: None)  # the file is written
    names: dict[str, Any] = {"x": x, "explainer": explainer, "lrpfx": there}
    exec(lines.replace("[3, 5]", "[3, 1]"), names)
    expected = explainer(x, [3, 1])
    assert apart(torch.from_numpy(names["relevance"]), expected.relevance) < TOLERANCE


class Sampled(nn.Module):
    """With an op whose gradient ONNX has nothing for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)
        self.register_buffer("grid", torch.rand(1, 2, 2, 2) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.grid.expand(len(x), 2, 2, 2)
        hidden = nn.functional.grid_sample(self.conv(x).relu(), grid, align_corners=False)
        return self.head(hidden.flatten(1))


def test_what_onnx_has_nothing_for_is_refused_by_op_module_and_line(tmp_path: Path) -> None:
    x = torch.randn(2, 1, 6, 6)
    explainer = lrpfx.Explainer(nn.Sequential(Sampled()), x, "epsilon_plus")
    with pytest.raises(ExportError) as caught:
        lrpfx.export(explainer, tmp_path / "model.onnx", x)
    (where,) = caught.value.where
    assert where.startswith("aten.grid_sampler_2d_backward.default: 0: grid_sampler, float32")
    assert "test_onnx_file.py" in where and "nn.functional.grid_sample(" in where
    assert not list(tmp_path.iterdir())
    lrpfx.export(explainer, tmp_path / "model.pt2", x)


def test_what_onnxruntime_has_no_kernel_for_is_refused(tmp_path: Path) -> None:
    layers = nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3)
    x = torch.randn(2, 1, 6, 6).double()
    explainer = lrpfx.Explainer(nn.Sequential(*layers).double(), x, "epsilon_plus")
    with pytest.raises(ExportError, match="onnxruntime cannot run(.|\n)*float32"):
        lrpfx.export(explainer, tmp_path / "model.onnx", x)
    assert not list(tmp_path.iterdir())


def test_a_file_says_what_it_was_made_of_and_that_is_data_only(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install -e '.[export]'")
    path, names = tmp_path / "model.onnx", ["cat", "dog", "", "42"]
    x = torch.randn(2, 6)
    explainer = lrpfx.Explainer(perceptron(), x, "epsilon_plus")
    lrpfx.export(explainer, path, x, target="argmax", class_names=names)
    session = onnxruntime.InferenceSession(path)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["lrpfx"])
    assert facts["class_names"] == names
    assert facts["versions"]["lrpfx"] == lrpfx.__version__
    assert [node["rule"] for node in facts["nodes"]][0].startswith("Epsilon")
    shapes = [value.shape for value in (*session.get_inputs(), *session.get_outputs())]
    assert shapes == [["N", 6], ["N", 4], ["N", 6]]

    expected, explanation = run(path, x), explainer(x)
    assert apart(expected[0], explanation.output) < TOLERANCE
    assert apart(expected[1], explanation.relevance) < TOLERANCE
    changed = onnx.load(path)
    told = '__import__("os").abort()'
    changed.metadata_props[0].value = told
    onnx.save(changed, path)
    assert onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["lrpfx"] == told
    assert all(map(torch.equal, run(path, x), expected))


def test_sizes_without_a_name_stay_without_one() -> None:
    """onnxruntime takes sizes of one name for equal, and shares memory by that."""
    ir = pytest.importorskip("onnx_ir", reason="pip install -e '.[export]'")
    x = ir.Value(name="x", shape=ir.Shape(["s77", None, "2*s77", 3]))
    model = SimpleNamespace(graph=ir.Graph([x], [], nodes=[]))
    _name_sizes(model, SimpleNamespace(letters=[{0: "N"}]))  # type: ignore[arg-type]
    assert x.shape == ir.Shape(["N", None, "2*N", 3])
