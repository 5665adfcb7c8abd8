"""SHAP's own plots draw our explanations; values and base values sum to what was explained."""

import functools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import errors

shap = pytest.importorskip("shap", reason="pip install 'lrpfx[shap]'")
matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402


@functools.cache
def table() -> lrpfx.Explainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    return lrpfx.Explainer(model, torch.randn(4, 5), "epsilon_all")


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)).sum(1))


def test_values_and_base_values_sum_to_the_output() -> None:
    x = torch.randn(4, 5)
    explanation = table()(x, [0, 1, 2, 0])
    found = explanation.to_shap(feature_names=list("abcde"))
    picked = explanation.output[range(4), [0, 1, 2, 0]]
    np.testing.assert_allclose(found.values.sum(1) + found.base_values, picked, rtol=1e-5)
    np.testing.assert_allclose(found.data, x.numpy(), rtol=1e-6)
    assert found.feature_names == list("abcde")
    np.testing.assert_array_equal(found.values, explanation.relevance.double())


def test_several_targets_are_outputs() -> None:
    x = torch.randn(4, 5)
    explanation = table()(x, "all")
    found = explanation.to_shap()
    assert found.values.shape == (4, 5, 3) and found.base_values.shape == (4, 3)
    np.testing.assert_allclose(
        found.values.sum(1) + found.base_values, explanation.output, rtol=1e-4, atol=1e-5
    )
    assert found.output_names == ["class 0", "class 1", "class 2"]


def drawn(path: Path) -> None:
    plt.gcf().savefig(path)
    plt.close("all")
    assert plt.imread(path)[..., :3].std() > 0.01


def test_bars_and_waterfalls_are_drawn(tmp_path: Path) -> None:
    found = table()(torch.randn(4, 5), 1).to_shap(feature_names=list("abcde"))
    shap.plots.waterfall(found[0], show=False)
    drawn(tmp_path / "waterfall.png")
    shap.plots.bar(found, show=False)
    drawn(tmp_path / "bar.png")
    shap.plots.beeswarm(found, show=False)
    drawn(tmp_path / "beeswarm.png")


@pytest.mark.parametrize("target", [1, [[0, 2], [1, 0]]], ids=["one", "several"])
def test_images_are_drawn(tmp_path: Path, target: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.rand(2, 3, 8, 8)
    found = lrpfx.explain(model, x, target).to_shap()
    assert found.values.shape[:4] == found.data.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(found.data, x.permute(0, 2, 3, 1), rtol=1e-6)
    shap.plots.image(found, show=False)
    drawn(tmp_path / "image.png")


def test_text_is_drawn() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 3, 2], [4, 4, 0]])
    explanation = lrpfx.explain(Bag().eval(), ids, 1)
    found = explanation.to_shap(tokenizer=["<s>", "the", "old", "green", "ball", "rolls"])
    assert found.data.tolist() == [["the", " green", " old"], ["ball", " ball", " <s>"]]
    assert found.output_names == "class 1"
    page = shap.plots.text(found[0], display=False)
    assert "green" in page
    assert explanation.to_shap().data.tolist() == ids.tolist()
    for words, written in (
        (
            ["<s>", "rolls", "##er", "old", "ball", "s"],
            [["rolls", " old", "er"], ["ball", " ball", " <s>"]],
        ),
        (["<s>", "\u2581a", "b", "\u0120c", "d", "."], [[" a", " c", "b"], ["d", "d", "<s>"]]),
    ):
        assert explanation.to_shap(tokenizer=words).data.tolist() == written


def test_classes_have_names() -> None:
    x, names = torch.randn(4, 5), ["cat", "dog", "cow"]
    every = table()(x, "all").to_shap(class_names=names)
    assert every.output_names == names
    one = table()(x, 1).to_shap(class_names=dict(enumerate(names)))
    assert one.output_names == one[0].output_names == "dog"
    np.testing.assert_array_equal(every[:, :, "dog"].values, one.values)
    assert table()(x, [0, 1, 2, 0]).to_shap(class_names=names).output_names is None
    with pytest.raises(errors.InputError, match="no name of class 2"):
        table()(x, 2).to_shap(class_names=["cat", "dog"])


def test_what_shap_has_no_form_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * 2 + b

    two = (torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(errors.InputError, match="this explanation has 2"):
        lrpfx.explain(Two().eval(), two, 1).to_shap()
    with pytest.raises(errors.InputError, match="holds no token ids"):
        table()(torch.randn(4, 5), 1).to_shap(tokenizer=list("abc"))
    monkeypatch.setitem(__import__("sys").modules, "shap", None)
    with pytest.raises(ImportError, match=r"lrpfx\[shap\]"):
        table()(torch.randn(4, 5), 1).to_shap()
