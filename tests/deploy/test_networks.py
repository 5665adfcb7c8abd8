"""Random networks under random rules, exported: their files give the Explainer's relevance."""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import lrpfx
from tests.oracle import laws
from tests.oracle.strategies import to_torch
from tests.rules.test_laws import cases

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")
pytest.importorskip("onnxscript", reason="pip install -e '.[export]'")

#: In float32, relative to the largest value of the map.
TOLERANCE = 1e-5


def check(case: laws.Case, path: Path) -> None:
    """Samples once and twice over, the strongest output of each."""
    network = case.network
    model = to_torch(network, "modules").float()
    x = tuple(t.float() for t in laws.tensors(network))
    rules = laws.entries(network) or None
    explainer = lrpfx.Explainer(model, x, rules)
    lrpfx.export(explainer, path, x, target="argmax")
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    for inputs in (x, tuple(torch.cat([t, t]) for t in x)):
        expected = explainer(inputs, ledger=True)
        feeds = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        output, *relevance = map(torch.from_numpy, session.run(None, feeds))
        assert laws.relative([output], [expected.output]) < TOLERANCE
        assert laws.relative(relevance, list(expected.relevance)) < TOLERANCE


@settings(max_examples=1)
@given(case=cases())
def test_a_random_network_in_a_file(
    case: laws.Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(case, tmp_path_factory.mktemp("network") / "model.onnx")


@pytest.mark.nightly
@settings(max_examples=40)
@given(case=cases())
def test_many_random_networks_in_files(
    case: laws.Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(case, tmp_path_factory.mktemp("network") / "model.onnx")
