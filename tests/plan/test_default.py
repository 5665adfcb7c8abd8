"""The default composite: for each op the rule that is right where it stands."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from tests.conftest import Apply, traced_once


def attention(width: int) -> nn.Module:
    return nn.MultiheadAttention(width, 2, batch_first=True)


def block(m: Apply, x: Tensor) -> Tensor:
    y = m.norm(x)
    return x + m.attention(y, y, y, need_weights=False)[0]


def vision_transformer(m: Apply, x: Tensor) -> Tensor:
    tokens = m.patches(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([m.token.expand(len(x), -1, -1), tokens], 1) + m.places
    tokens = block(m, tokens)
    return m.head(m.mlp(tokens)[:, 0])


def convolutional(m: Apply, x: Tensor) -> Tensor:
    """With a stem that cuts patches, as ConvNeXt has it."""
    y = m.stem(x)
    y = torch.relu(y + m.conv(torch.relu(y)))
    return m.head(y.mean((2, 3)))


def attending_convolutional(m: Apply, x: Tensor) -> Tensor:
    y = torch.relu(m.stem(x))
    y = block(m, y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(y.shape)
    return m.head(torch.relu(m.conv(y)).mean((2, 3)))


def pointwise(m: Apply, x: Tensor) -> Tensor:
    """A transformer over rows whose linear layers are convolutions with a kernel of one."""
    tokens = block(m, m.widen(x[:, 0]).mT).mT
    tokens = tokens + m.widen(nn.functional.gelu(m.narrow(tokens)))
    return m.head(tokens.mean(2))


def members(name: str) -> dict[str, Any]:
    common = {"norm": nn.LayerNorm(4), "attention": attention(4), "head": nn.Linear(4, 3)}
    if name == "vit":
        patches, mlp = nn.Conv2d(1, 4, 2, 2), nn.Sequential(nn.Linear(4, 8), nn.GELU())
        token, places = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(10, 4))
        mlp.append(nn.Linear(8, 4))
        return {**common, "patches": patches, "mlp": mlp, "token": token, "places": places}
    if name == "pointwise":
        widen, narrow = nn.Conv1d(6, 4, 1), nn.Conv1d(4, 6, 1)
        return {**common, "widen": widen, "narrow": narrow}
    return {**common, "stem": nn.Conv2d(1, 4, 2, 2), "conv": nn.Conv2d(4, 4, 3, padding=1)}


FORWARD = {
    "vit": vision_transformer,
    "cnn": convolutional,
    "both": attending_convolutional,
    "pointwise": pointwise,
}


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return Apply(FORWARD[name], **members(name)).double()


def images() -> Tensor:
    return torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(
    ("name", "composite"),
    [
        ("cnn", "epsilon_gamma"),
        ("vit", "attnlrp"),
        ("pointwise", "attnlrp"),
        ("mlp", "epsilon_all"),
    ],
)
def test_a_network_of_one_kind_is_explained_by_its_composite(name: str, composite: str) -> None:
    with traced_once():
        m, x = model(name), images()
        default, named = (lrpfx.Explainer(m, x, rules) for rules in (None, composite))
        for ledger in (True, False):
            got, expected = (e(x, 1, ledger=ledger) for e in (default, named))
            assert torch.equal(got.relevance, expected.relevance)


def rules_of(report: lrpfx.Report, *kinds: str) -> list[tuple[str, str]]:
    return [(row.rule, row.why) for row in report.rows if row.kind in kinds]


def test_the_report_says_which_part_of_the_default_it_was() -> None:
    vit, both = (lrpfx.Explainer(model(name), images()).report for name in ("vit", "both"))
    assert vit.rules == "auto (default: attention as attnlrp)"
    assert both.rules == "auto (default: convolutions as epsilon_gamma; attention as attnlrp)"
    assert rules_of(vit, "conv") == [("Epsilon(epsilon=0)", "auto: predicate patch_embeddings")]
    assert rules_of(both, "conv") == [("Gamma", "auto: kind conv")] * 2
    assert (
        rules_of(both, "matmul")
        == [("Bilinear(stabilizer=0)", "auto: matmul beside attention")] * 2
    )
    assert set(rules_of(both, "linear")) == {
        ("Epsilon(epsilon=0)", "auto: linear beside attention")
    }


def test_attention_beside_convolutions_leaves_them_their_rule() -> None:
    m, x = model("both"), images()
    got = lrpfx.explain(m, x, 1)
    by_hand = [("conv", lrpfx.Gamma()), lrpfx.composites.AttnLRP()]
    expected = lrpfx.explain(m, x, 1, rules=by_hand)
    assert torch.equal(got.relevance, expected.relevance)


def test_each_branch_of_a_network_has_its_own_rules() -> None:
    cnn, vit, x = model("cnn"), model("vit"), images()
    both = Apply(lambda m, a, b: (m.cnn(a), m.vit(b)), cnn=cnn, vit=vit)

    def target(out: Any) -> Tensor:
        return out[0][:, 1] + out[1][:, 1]

    together = lrpfx.explain(both, (x, x.flip(3)), target).relevance
    for got, m, image, rules in zip(
        together, (cnn, vit), (x, x.flip(3)), ("epsilon_gamma", "attnlrp"), strict=True
    ):
        assert torch.equal(got, lrpfx.explain(m, image, 1, rules=rules).relevance)
