"""Models of many families, and ops of all kinds, in files that onnxruntime runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from benchmarks import exported
from tests.conftest import Apply
from tests.oracle import zoo

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")
pytest.importorskip("onnxscript", reason="pip install -e '.[export]'")

#: Relative to the largest value of the map.
TOLERANCE = 1e-5


@pytest.mark.nightly
@pytest.mark.parametrize("name", exported.CASES)
def test_a_model_of_each_family(name: str) -> None:
    table = exported.table([name], 0.0)
    assert not table.wrong and len(table.rows) == 1


def tokens() -> nn.Module:
    """Attention that is fused, gated layers, and an RMS norm, over token ids."""

    def forward(model: Any, ids: Tensor) -> Tensor:
        x = model.embed(ids)
        q, k, v = model.qkv(model.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + model.down(F.silu(model.gate(x)) * model.up(x))
        return model.head(x[:, -1])

    parts = {"embed": nn.Embedding(9, 4), "qkv": nn.Linear(4, 12), "norm": nn.RMSNorm(4)}
    parts |= {"gate": nn.Linear(4, 6), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}
    return zoo.randomize(Apply(forward, **parts, head=nn.Linear(4, 3))).eval()


def recurrent() -> nn.Module:
    def forward(model: Any, x: Tensor) -> Tensor:
        return model.head(model.steps(x)[0][:, -1])

    parts = {"steps": nn.LSTM(2, 3, batch_first=True), "head": nn.Linear(3, 3)}
    return zoo.randomize(Apply(forward, **parts)).eval()


def resized() -> nn.Module:
    def forward(model: Any, x: Tensor) -> Tensor:
        x = F.group_norm(model.conv(x), 2).relu()
        x = F.interpolate(x, scale_factor=2, mode="bilinear") + F.interpolate(x, size=(12, 12))
        x = F.interpolate(F.pad(x, (1, 0, 2, 1), mode="replicate"), size=(5, 7), mode="bicubic")
        pooled = F.adaptive_max_pool2d(x, (4, 3)), F.adaptive_avg_pool2d(x, (3, 4))
        return model.head(torch.cat([each.flatten(1) for each in pooled], 1))

    parts = {"conv": nn.Conv2d(2, 4, 3, padding=1), "head": nn.Linear(96, 3)}
    return zoo.randomize(Apply(forward, **parts)).eval()


IDS, IMAGES = torch.randint(9, (2, 5)), zoo.images(2, 2, 6, 6).float()
CASES: dict[str, tuple[Any, Tensor, Any]] = {
    "tokens": (tokens, IDS, None),
    "tokens, attnlrp": (tokens, IDS, "attnlrp"),
    "tokens, cplrp": (tokens, IDS, "cplrp"),
    "recurrent": (recurrent, torch.randn(2, 3, 2), None),
    "resized": (resized, IMAGES, "epsilon_plus"),
}
QUICK = "tokens"


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c == QUICK else pytest.mark.nightly) for c in CASES]
)
def test_ops_of_all_kinds(case: str, tmp_path: Path) -> None:
    make, x, rules = CASES[case]
    explainer = lrpfx.Explainer(make(), x, rules)
    lrpfx.export(explainer, tmp_path / "model.onnx", x)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [given.name for given in session.get_inputs()]
    more, target = torch.cat([x, x.flip(1)]), torch.tensor([0, 1, 2, -1])
    feeds = {name: t.numpy() for name, t in zip(names, (more, target), strict=True)}
    output, relevance = map(torch.from_numpy, session.run(None, feeds))
    expected = explainer(more, target, ledger=True)
    for got, right in ((output, expected.output), (relevance, expected.relevance)):
        assert (got - right).abs().max() <= TOLERANCE * right.abs().max()
