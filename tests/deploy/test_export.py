"""What a program is, and what is refused; in PyTorch's own files, which need no other package."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.errors import ExportError, InputError, LrpError, LrpWarning, TargetError
from tests.conftest import Apply, assert_untouched
from tests.oracle import zoo

#: Relative to the largest value of the map, in float64.
TOLERANCE = 1e-12


def apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def loaded(path: Path) -> Any:
    return torch.export.load(path).module()


def perceptron() -> nn.Module:
    layers = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)
    return zoo.randomize(nn.Sequential(*layers)).double().eval()


X = zoo.images(3, 6)


def test_a_program_is_loaded_by_torch_alone_and_gives_output_and_relevance(tmp_path: Path) -> None:
    model, path = perceptron(), tmp_path / "model.pt2"
    explainer = lrpfx.Explainer(model, X, "epsilon_plus")
    with assert_untouched(model):
        lrpfx.export(explainer, path, X, class_names=["a", "b", "c", "d"])
    program = loaded(path)
    for samples in (1, 2, 7):
        x, target = torch.randn(samples, 6).double(), torch.arange(samples) % 4 - 2
        output, relevance = program(x, target)
        expected = explainer(x, target)
        assert apart(output, expected.output) < TOLERANCE
        assert apart(relevance, expected.relevance) < TOLERANCE
    facts = {"lrpfx.json": ""}
    torch.export.load(path, extra_files=facts)
    assert json.loads(facts["lrpfx.json"])["class_names"] == ["a", "b", "c", "d"]
    for target in (4, -5):
        with pytest.raises(RuntimeError, match="out of bounds"):
            program(X[:1], torch.tensor([target]))


def test_a_program_keeps_the_parameters_of_its_moment(tmp_path: Path) -> None:
    model, path = perceptron(), tmp_path / "model.pt2"
    explainer = lrpfx.Explainer(model, X, "epsilon_plus")
    with torch.no_grad():
        model[0].weight.mul_(2)
    expected = explainer(X, 1)
    lrpfx.export(explainer, path, X)
    with torch.no_grad():
        model[0].weight.mul_(2)
    output, relevance = loaded(path)(X, torch.ones(3, dtype=torch.int64))
    assert apart(output, expected.output) < TOLERANCE
    assert apart(relevance, expected.relevance) < TOLERANCE


@pytest.mark.filterwarnings("ignore:lrpfx. relevance grew")
def test_relevance_of_a_model_in_float16_neither_vanishes_nor_overflows(tmp_path: Path) -> None:
    """The last two samples are added up to 2**-20 of their summands, and little relevance fits."""
    model = nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1 + 2**-10, -1.0], [1.0, 0.5]]))
    model, x = model.half(), torch.rand(3, 2).half()
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    lrpfx.export(explainer, tmp_path / "model.pt2", x)
    program = loaded(tmp_path / "model.pt2")
    small, large = 1e-5 * x.float(), torch.tensor([[64 - 2**-4, 64.0]] * 2)
    for given in (small.half(), large.half()):
        target = torch.zeros(len(given), dtype=torch.long)
        _, relevance = program(given, target)
        expected = explainer(given, target).relevance
        assert relevance.dtype == expected.dtype == torch.float32
        assert expected.isfinite().all() and expected.abs().amax(1).min() > 0
        assert apart(relevance, expected) < 1e-2


def test_inputs_keep_their_names_and_structures(tmp_path: Path) -> None:
    def forward(model: Any, tokens: Tensor, target: dict[str, Tensor], scale: float) -> Any:
        hidden = model.embed(tokens).mean(1) * scale + model.linear(target["extra"])
        return {"logits": model.head(hidden.relu()), "hidden": (hidden,)}

    parts = {"embed": nn.Embedding(9, 4), "linear": nn.Linear(3, 4), "head": nn.Linear(4, 5)}
    model = zoo.randomize(Apply(forward, **parts)).double().eval()
    extra = {"extra": torch.randn(2, 3).double()}
    inputs = {"scale": 0.5, "tokens": torch.randint(9, (2, 5)), "target": extra}
    explainer = lrpfx.Explainer(model, inputs, "epsilon_plus")
    lrpfx.export(explainer, tmp_path / "model.pt2", inputs)
    output, relevance = loaded(tmp_path / "model.pt2")(**inputs, target_=torch.tensor([1, 4]))
    expected = explainer(inputs, [1, 4])
    assert set(output) == {"logits", "hidden"}
    assert apart(output["logits"], expected.output["logits"]) < TOLERANCE
    assert apart(relevance["tokens"], expected.relevance["tokens"]) < TOLERANCE
    got, right = relevance["target"]["extra"], expected.relevance["target"]["extra"]
    assert apart(got, right) < TOLERANCE
    assert relevance["scale"] is None


def test_sizes_that_the_explainer_leaves_open_may_vary(tmp_path: Path) -> None:
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3))
    model = zoo.randomize(model).double().eval()
    x = zoo.images(2, 2, 8, 9)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus_flat", dynamic=(2, 3))
    lrpfx.export(explainer, tmp_path / "model.pt2", x, target="argmax")
    larger = zoo.images(3, 2, 11, 13)
    output, relevance = loaded(tmp_path / "model.pt2")(larger)
    expected = explainer(larger)
    assert apart(output, expected.output) < TOLERANCE
    assert apart(relevance, expected.relevance) < TOLERANCE


@pytest.mark.nightly  # half a minute
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("PyTorch's compiler needs a C++ compiler on the CPU, and there is none")
    explainer = lrpfx.Explainer(perceptron(), X, "epsilon_plus")
    path = tmp_path / "model.aoti.pt2"
    lrpfx.export(explainer, path, X)
    compiled = torch._inductor.aoti_load_package(str(path))
    x = torch.randn(5, 6).double()
    output, relevance = compiled(x, torch.arange(5) % 4)
    expected = explainer(x, [0, 1, 2, 3, 0])
    assert apart(output, expected.output) < TOLERANCE
    assert apart(relevance, expected.relevance) < TOLERANCE
    assert "epsilon_plus" in compiled.get_metadata()["lrpfx"]


def tokens() -> nn.Module:
    """Logits (N, T, V)."""
    layers = OrderedDict(embed=nn.Embedding(9, 4), head=nn.Linear(4, 9))
    return zoo.randomize(nn.Sequential(layers)).eval()


def score() -> nn.Module:
    """One number per sample."""
    return zoo.randomize(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))).double().eval()


IDS = torch.randint(9, (2, 3))
REFUSED: dict[str, tuple[Any, Any, str, dict[str, Any], type[LrpError], str]] = {
    "ending": (perceptron, X, "model.bin", {}, InputError, "let the name end in .onnx"),
    "folder": (perceptron, X, "nowhere/model.pt2", {}, InputError, "there is no folder"),
    "class": (perceptron, X, "m.pt2", {"target": 3}, TargetError, "cannot be written down"),
    "tokens": (tokens, IDS, "m.pt2", {}, TargetError, "export a wrapper module"),
    "score": (score, X, "m.pt2", {}, TargetError, 'give target="argmax"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_writes_no_file(case: str, tmp_path: Path) -> None:
    make, x, name, options, error, text = REFUSED[case]
    model = make()
    explainer = lrpfx.Explainer(model, x)
    with assert_untouched(model), pytest.raises(error, match=text):
        lrpfx.export(explainer, tmp_path / name, x, **options)
    assert not list(tmp_path.iterdir())


def test_arguments_of_wrong_kinds_are_refused_and_no_file_is_written(tmp_path: Path) -> None:
    explainer = lrpfx.Explainer(perceptron(), X)
    folder = tmp_path / "folder.pt2"
    folder.mkdir()
    for path, told in ((None, "but NoneType"), (X, "but Tensor"), (folder, "is a folder")):
        with pytest.raises(InputError, match=told):
            lrpfx.export(explainer, path, X)  # type: ignore[arg-type]
    path = tmp_path / "m.pt2"
    for target in (torch.tensor([1, 2, 3]), np.array([1, 2, 3]), (1, 2), lambda output: output):
        with pytest.raises(TargetError, match="cannot be written down"):
            lrpfx.export(explainer, path, X, target=target)  # type: ignore[arg-type]
    for names, told in (({0: "a"}, "is a dict"), (5, "is a int"), (["a"], "1 class_names, and 4")):
        with pytest.raises(InputError, match=told):
            lrpfx.export(explainer, path, X, class_names=names)  # type: ignore[arg-type]
    for x in (None, X.float(), X[:, :3], X.to("meta"), X[:0]):
        with pytest.raises(InputError):
            lrpfx.export(explainer, path, x)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [folder]


def test_what_was_recorded_is_exported_for_every_batch_size(tmp_path: Path) -> None:
    model, path = perceptron(), tmp_path / "model.pt2"
    explainer = lrpfx.Explainer(model, X, "epsilon_plus", capture="record")
    model.train()  # since: it is the model in evaluation mode that is explained
    lrpfx.export(explainer, path, X)
    assert model.training
    model.eval()
    x, target = torch.randn(5, 6).double(), torch.arange(5) % 4
    expected = lrpfx.explain(model, x, target, "epsilon_plus")
    assert apart(loaded(path)(x, target)[1], expected.relevance) < TOLERANCE


def test_what_can_be_recorded_only_is_exported_for_its_sizes_with_a_warning(tmp_path: Path) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise RuntimeError("not like this")
        return model.linear(x)

    model, path = Apply(forward, linear=nn.Linear(6, 2)).double(), tmp_path / "model.pt2"
    explainer = lrpfx.Explainer(model, X)
    with pytest.warns(LrpWarning, match=r"for the sizes of the example inputs only"):
        lrpfx.export(explainer, path, X)
    target = torch.zeros(len(X), dtype=torch.long)
    expected = explainer(X, target).relevance
    assert apart(loaded(path)(X, target)[1], expected) < TOLERANCE


def test_a_model_that_fixes_its_batch_is_exported_for_it_with_a_warning(tmp_path: Path) -> None:
    model = Apply(lambda m, x: m.linear(x.reshape(len(x), 2, 3).flatten(1)), linear=nn.Linear(6, 2))
    explainer = lrpfx.Explainer(model.double(), X)
    with pytest.warns(LrpWarning, match=r"for the sizes of the example inputs only.*len\(x\)"):
        lrpfx.export(explainer, tmp_path / "model.pt2", X)


def test_a_run_that_values_decided_is_refused_by_its_line(tmp_path: Path) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.linear(x if float(x.sum()) > 0 else -x)

    model = Apply(forward, linear=nn.Linear(6, 2)).double()
    explainer = lrpfx.Explainer(model, X, capture="record")
    with pytest.raises(ExportError, match=r"decided by values(.|\n)*float\(x.sum\(\)\) > 0"):
        lrpfx.export(explainer, tmp_path / "model.pt2", X)
    assert not list(tmp_path.iterdir())


def test_a_rule_that_reads_values_is_refused_by_module_and_line(tmp_path: Path) -> None:
    def stabilized(z: Tensor) -> Tensor:
        return z + 1e-6 if float(z.detach().abs().max()) > 0 else z + 1

    rule = lrpfx.Epsilon(stabilized)
    explainer = lrpfx.Explainer(perceptron(), X, [("2", rule), "epsilon_plus"])
    with pytest.raises(ExportError, match=r"(?s)values and sizes.*where: 2: linear, float64"):
        lrpfx.export(explainer, tmp_path / "model.pt2", X)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tracer", ["export", "jit"])
def test_the_forward_pass_alone_is_not_exported(tracer: str) -> None:
    module = lrpfx.Explainer(perceptron(), X, "epsilon_plus").graph_module
    with pytest.raises(ExportError, match="the forward pass alone"):
        if tracer == "jit":
            torch.jit.trace(module, X)
        else:
            torch.export.export(module, (X,), strict=False)


@pytest.mark.parametrize("make, x", [(tokens, IDS), (score, X)], ids=["tokens", "score"])
def test_the_strongest_output_is_explained_where_there_are_no_classes(
    make: Any, x: Tensor, tmp_path: Path
) -> None:
    explainer = lrpfx.Explainer(make(), x)
    lrpfx.export(explainer, tmp_path / "model.pt2", x, target="argmax")
    output, relevance = loaded(tmp_path / "model.pt2")(x)
    expected = explainer(x)
    assert apart(output, expected.output) < 1e-6
    assert apart(relevance, expected.relevance) < 1e-6
