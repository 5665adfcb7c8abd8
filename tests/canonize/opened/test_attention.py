"""Attention, softmax and activations out of primitives: formulas, spellings, derivatives."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lrpfx
from lrpfx import composites
from tests.conftest import Apply, traced_once

pytestmark = pytest.mark.usefixtures("each_way")

Array = np.ndarray
EPS = 1e-6


def st_(z: Array) -> Array:
    return z + np.where(z >= 0, EPS, -EPS)


def reference_attention(
    q: Array, k: Array, v: Array, scale: float, mask: Array | None, R: Array
) -> tuple[Array, Array, Array]:
    """Relevance of q, k, v of one head by the formulas, with loops over the matrix products."""
    scores = scale * (q @ k.T)
    shifted = scores if mask is None else scores + mask
    weights = np.exp(shifted - shifted.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    z = weights @ v
    R_w, R_v = reference_bilinear(weights, v, z, R)
    finite = np.where(np.isinf(shifted), 0.0, shifted)
    R_x = finite * (R_w - weights * R_w.sum(1, keepdims=True))
    if mask is not None:
        R_x = np.where(np.isinf(shifted), 0.0, scores * R_x / st_(shifted))
    R_s = scores * R_x / st_(scores)
    R_q, R_k = reference_bilinear(q, k.T, q @ k.T, R_s)
    return R_q, R_k.T, R_v


def reference_bilinear(a: Array, b: Array, z: Array, R: Array) -> tuple[Array, Array]:
    """R_a[i, j] = sum_k a_ij b_jk R_ik / st(2 z_ik), and R_b likewise."""
    R_a, R_b = np.zeros_like(a), np.zeros_like(b)
    s = R / st_(2 * z)
    for i, j, k in np.ndindex(a.shape[0], a.shape[1], b.shape[1]):
        R_a[i, j] += a[i, j] * b[j, k] * s[i, k]
        R_b[j, k] += a[i, j] * b[j, k] * s[i, k]
    return R_a, R_b


class Attention(nn.Module):
    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.fn(q, k, v)


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    return torch.softmax(scores, -1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("nhid,nhjd->nhij", q, k) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    return torch.einsum("nhij,nhjd->nhid", F.softmax(scores, dim=-1), v)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, h, t, d = q.shape
    q, k, v = (x.reshape(n * h, -1, d) for x in (q, k, v))
    scores = torch.bmm(q, k.mT) * d**-0.5
    return torch.bmm(scores.softmax(2), v).view(n, h, t, d)


@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["", "add", "inf"])
)
def test_attention_follows_the_formulas(seed: int, t: int, d: int, masked: str) -> None:
    rng = np.random.default_rng(seed)
    q, k, v, R = (rng.normal(size=(2, 1, t, d)) for _ in range(4))
    mask = None
    if masked:
        mask = rng.normal(size=(t, t)) if masked == "add" else np.triu(np.full((t, t), -np.inf), 1)
    tensors = tuple(torch.from_numpy(x) for x in (q, k, v))
    bias = None if mask is None else torch.from_numpy(mask)
    model = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    rules = composites.AttnLRP(epsilon=EPS)
    e = lrpfx.explain(model, tensors, torch.from_numpy(R), rules=rules)
    for n in range(2):
        expected = reference_attention(q[n, 0], k[n, 0], v[n, 0], d**-0.5, mask, R[n, 0])
        for got, want in zip(e.relevance, expected, strict=True):
            size = max(1.0, float(np.abs(want).max()))
            np.testing.assert_allclose(got[n, 0].numpy(), want, rtol=1e-8, atol=1e-8 * size)
    assert abs(e.report.unaccounted) < 1e-8 * max(1.0, *map(abs, e.report.absorbed.values()))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


CAUSAL = torch.triu(torch.full((5, 5), -torch.inf, dtype=torch.float64), 1)
SPELLINGS = {
    "sdpa": (sdpa, by_hand),
    "einsum": (by_einsum, by_hand),
    "bmm": (by_bmm, by_hand),
    "causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: by_hand(q, k, v, CAUSAL),
    ),
    "boolean mask": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=CAUSAL == 0),
        lambda q, k, v: by_hand(q, k, v, CAUSAL),
    ),
    "masked_fill": (
        lambda q, k, v: (
            (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(CAUSAL != 0, -torch.inf).softmax(-1) @ v
        ),
        lambda q, k, v: by_hand(q, k, v, CAUSAL),
    ),
    "scale": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
        lambda q, k, v: by_hand(q * 0.3 * q.shape[-1] ** 0.5, k, v),
    ),
}


@pytest.mark.parametrize("rules", ["attnlrp", "cplrp", "epsilon_plus_flat"])
@pytest.mark.parametrize(("one", "other"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_attention_gives_the_same(
    one: Callable, other: Callable, rules: str
) -> None:
    torch.manual_seed(0)
    qkv = tuple(torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    seed = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    a, b = (lrpfx.explain(Attention(fn), qkv, seed, rules=rules).relevance for fn in (one, other))
    for x, y in zip(a, b, strict=True):
        # Each further division of the other spelling costs its epsilon.
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * max(1.0, y.abs().max().item()))


def repeated(t: Tensor, dim: int = 2) -> Tensor:
    """Each head twice, as transformers spells it; along another dimension all heads twice."""
    return t.unsqueeze(dim).expand(*t.shape[:dim], 2, *t.shape[dim:]).reshape(-1, 4, *t.shape[2:])


GROUPED = {
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "repeated": lambda q, k, v: sdpa(q, repeated(k), repeated(v)),
    "sliced": lambda q, k, v: sdpa(q, repeated(k[:, :, :]), repeated(v[:, :, :])),
}


@pytest.mark.parametrize("fn", GROUPED.values(), ids=GROUPED)
def test_grouped_query_attention_shares_keys(fn: Callable) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(2))
    seed = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    by_copies = Attention(
        lambda q, k, v: by_hand(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    )
    expected = lrpfx.explain(by_copies, (q, k, v), seed, rules="attnlrp").relevance
    explainer = lrpfx.Explainer(Attention(fn), (q, k, v), "attnlrp")
    assert {row.op for row in explainer.report.rows} >= {"repeat_interleave"}
    for ledger in (True, False):
        got = explainer((q, k, v), seed, ledger=ledger).relevance
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_heads_that_are_copied_in_another_order_are_not_grouped() -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(2))
    model = Attention(lambda q, k, v: sdpa(q, repeated(k, 1), repeated(v, 1)))
    by_copies = Attention(lambda q, k, v: by_hand(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)))
    a, b = (
        lrpfx.explain(m, (q, k, v), q, rules="attnlrp", ledger=False).relevance
        for m in (model, by_copies)
    )
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


def test_cp_lrp_gives_everything_to_the_values() -> None:
    torch.manual_seed(0)
    qkv = tuple(torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    seed = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    e = lrpfx.explain(Attention(sdpa), qkv, seed, rules=composites.CPLRP(epsilon=1e-9))
    of_q, of_k, of_v = e.relevance
    assert of_q.abs().max() == 0 and of_k.abs().max() == 0
    q, k, v = qkv
    weights = torch.softmax(q @ k.mT / 2, -1)
    expected = v * (weights.mT @ (seed / (weights @ v)))
    torch.testing.assert_close(of_v, expected, rtol=1e-5, atol=1e-5)
    assert "constants" in str(e.report)


def test_multi_head_attention_modules_are_explained() -> None:
    """nn.TransformerEncoder in evaluation mode, where eager PyTorch takes a fused fast path."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 3))
    model = model.double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    e = lrpfx.explain(model, x, 1)
    assert "attnlrp" in e.report.rules
    torch.testing.assert_close(e.output, model(x))
    assert abs(e.report.unaccounted) < 1e-8
    singles = [lrpfx.explain(model, x[i : i + 1], 1).relevance for i in range(3)]
    torch.testing.assert_close(e.relevance, torch.cat(singles))


@pytest.mark.parametrize("rules", ["attnlrp", "cplrp"])
def test_derivatives_through_attention_are_exact(rules: str) -> None:
    torch.manual_seed(0)
    name = {"attnlrp": composites.AttnLRP, "cplrp": composites.CPLRP}[rules]
    qkv = tuple(torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    seed = torch.randn(1, 1, 3, 2, dtype=torch.float64)
    explainer = lrpfx.Explainer(Attention(sdpa), qkv, name(epsilon=0.1))

    def loss(qkv: tuple[Tensor, ...], create_graph: bool) -> Tensor:
        relevance = explainer(qkv, seed, create_graph=create_graph).relevance
        return sum(r.square().sum() for r in relevance)

    gradients = torch.autograd.grad(loss(qkv, True), qkv, materialize_grads=True)
    for i, gradient in enumerate(gradients):
        direction = torch.randn_like(qkv[i])
        above, below = (
            loss(tuple(x + s * 1e-6 * direction if j == i else x for j, x in enumerate(qkv)), False)
            for s in (1, -1)
        )
        numeric = ((above - below) / 2e-6).item()
        assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-4, abs=1e-6)


# Activations out of primitives, products, norms by hand -------------------------------------------


class Mlp(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fn, self.a, self.b = fn, nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.fn(self.a(x)))


def tanh_gelu(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


COMPOSED = {
    "gelu": (tanh_gelu, lambda x: F.gelu(x, approximate="tanh")),
    "erf gelu": (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), F.gelu),
    "silu": (lambda x: x * torch.sigmoid(x), F.silu),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
    "hardswish": (lambda x: x * (F.relu6(x + 3) / 6), F.hardswish),
    "softsign": (lambda x: x / (1 + x.abs()), F.softsign),
    "square": (lambda x: x * x, torch.square),
    "cube": (lambda x: x * (x * x), lambda x: x**3),
}


@pytest.mark.parametrize(("written", "whole"), COMPOSED.values(), ids=COMPOSED)
@pytest.mark.parametrize("rules", ["attnlrp", "guided_backprop"])
def test_an_activation_out_of_primitives_is_one_activation(
    written: Callable, whole: Callable, rules: str
) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    a, b = (lrpfx.explain(Mlp(fn), x, 1, rules=rules) for fn in (written, whole))
    torch.testing.assert_close(a.relevance, b.relevance, rtol=1e-9, atol=1e-10)


def test_a_constant_before_the_activation_stays_outside() -> None:
    """Its share is absorbed, as in x + b before any other activation."""
    bias = torch.linspace(-1, 1, 6, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    e = lrpfx.explain(Mlp(lambda x: tanh_gelu(x.relu() + bias)), x, 1, rules="attnlrp")
    kinds = [row.kind for row in e.report.rows]
    assert kinds == ["linear", "relu", "shift", "composed", "linear"]


def test_a_gate_that_sees_more_than_its_factor_is_a_product() -> None:
    mixed = torch.randn(6, 6, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    e = lrpfx.explain(Mlp(lambda x: x * torch.sigmoid(x @ mixed)), x, 1, rules="attnlrp")
    assert "product" in [row.kind for row in e.report.rows]


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b, c: a * b * c,
        lambda a, b, c: a * (b * c),
        lambda a, b, c: (c * a) * b,
    ],
)
def test_products_do_not_depend_on_their_association(fn: Callable) -> None:
    abc = tuple(torch.randn(2, 3) for _ in range(3))
    seed = torch.randn(2, 3)
    for r in lrpfx.explain(Attention(fn), abc, seed, rules="attnlrp").relevance:
        torch.testing.assert_close(r, seed / 3)


RMS = {
    "rsqrt of pow": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "over sqrt": lambda x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6),
    "square": lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6) ** -0.5,
}


@pytest.mark.parametrize("fn", RMS.values(), ids=RMS)
def test_rms_norm_by_hand_is_rms_norm(fn: Callable) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    a = lrpfx.explain(Mlp(fn), x, 1, rules="attnlrp")
    b = lrpfx.explain(Mlp(lambda x: F.rms_norm(x, (6,), eps=1e-6)), x, 1, rules="attnlrp")
    torch.testing.assert_close(a.relevance, b.relevance, rtol=1e-4, atol=1e-5)


def test_layer_norm_by_hand_is_layer_norm() -> None:
    def fn(x: Tensor) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / torch.sqrt(var + 1e-5)

    x = torch.randn(3, 4, dtype=torch.float64)
    rules = composites.AttnLRP(epsilon=1e-12)
    a = lrpfx.explain(Mlp(fn), x, 1, rules=rules)
    b = lrpfx.explain(Mlp(lambda x: F.layer_norm(x, (6,))), x, 1, rules=rules)
    torch.testing.assert_close(a.relevance, b.relevance, rtol=1e-6, atol=1e-7)


def test_normalisation_by_the_vector_norm_passes_relevance() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    e = lrpfx.explain(Mlp(lambda x: F.normalize(x, dim=-1)), x, 1, rules="attnlrp")
    assert [row.kind for row in e.report.rows] == ["linear", "scale", "linear"]


def test_a_norm_that_is_the_output_is_not_a_constant() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    forms = (lambda x: x.norm(dim=-1, keepdim=True), lambda x: (x * x).sum(-1, True).sqrt())
    a, b = (
        lrpfx.explain(Mlp(lambda x, norm=norm: norm(x).expand(-1, 6)), x, 1, rules="attnlrp")
        for norm in forms
    )
    assert a.relevance.any()
    torch.testing.assert_close(a.relevance, b.relevance)


# Tokens ------------------------------------------------------------------------------------------


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4).double()
        self.head = nn.Linear(4, 3, bias=False).double()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.embed(ids) * mask.unsqueeze(-1)).sum(1))


def test_token_relevance_is_that_of_the_embedding_summed_over_features() -> None:
    model, ids = Bag(), torch.tensor([[1, 2, 3], [4, 4, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    e = lrpfx.explain(model, {"ids": ids, "mask": mask}, 1, rules=composites.EpsilonAll(1e-12))
    per_feature = model.embed(ids) * mask[..., None] * model.head.weight[1]
    torch.testing.assert_close(e.relevance["ids"], per_feature.sum(-1).detach())
    torch.testing.assert_close(e.embeddings["ids"], per_feature.detach())
    assert e.relevance["mask"] is None
    torch.testing.assert_close(e.relevance["ids"].sum(1), e.output[:, 1])


@pytest.mark.parametrize(
    "segments",
    [lambda ids: torch.zeros(ids.shape, dtype=torch.long), torch.zeros_like],
    ids=["zeros", "zeros_like"],
)
def test_an_embedding_of_the_shape_alone_is_a_constant(
    segments: Callable[[Tensor], Tensor],
) -> None:
    """Token types that default to zeros say nothing of the tokens; here they have other sizes."""

    class Typed(Bag):
        def __init__(self) -> None:
            super().__init__()
            self.types = nn.Embedding(2, 2).double()

        def forward(self, ids: Tensor) -> Tensor:
            types = self.types(segments(ids)).repeat(1, 1, 2)
            return self.head((self.embed(ids) + types).sum(1))

    model, ids = Typed(), torch.tensor([[1, 2, 3], [4, 4, 0]])
    e = lrpfx.explain(model, ids, 1, rules=composites.EpsilonAll(1e-12))
    per_feature = model.embed(ids) * model.head.weight[1]
    torch.testing.assert_close(e.relevance, per_feature.sum(-1).detach())
    assert e.report.absorbed["bias"] == pytest.approx(
        (model.types.weight[0].repeat(2) * 3 * model.head.weight[1]).sum().item() * 2
    )


@pytest.mark.parametrize(
    "look_up",
    [
        lambda embed, ids: embed(ids.T).transpose(0, 1),
        lambda embed, ids: embed(ids.flatten()).unflatten(0, ids.shape),
        lambda embed, ids: torch.cat([embed(ids[:, :1]), embed(ids[:, 1:])], 1),
        lambda embed, ids: embed((ids + 1).clamp(max=9)),
        lambda embed, ids: embed(ids // 2),
        lambda embed, ids: embed.weight[ids],
        lambda embed, ids: embed.weight[ids - 10],
        lambda embed, ids: embed.weight.index_select(0, ids.flatten()).unflatten(0, ids.shape),
        lambda embed, ids: embed(torch.where(ids > 3, ids - 1, ids % 2)),
        lambda embed, ids: embed(ids.masked_fill(torch.tensor([False, True, True]), 0)),
        lambda embed, ids: embed((ids.T + torch.tensor([[1], [0], [2]])).T),
        lambda embed, ids: embed(ids.to(torch.int8).flip(1).int()).flip(1),
        lambda embed, ids: embed(ids.flip(1)).flip(1),
    ],
)
def test_relevance_of_tokens_finds_its_way_back(look_up: Callable) -> None:
    class Product(Bag):
        def forward(self, ids: Tensor) -> Tensor:
            a, b, c = look_up(self.embed, ids).unbind(1)
            return self.head(a * b + c)

    class ProductOfVectors(Product):
        def forward(self, x: Tensor) -> Tensor:
            a, b, c = x.unbind(1)
            return self.head(a * b + c)

    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    vectors = look_up(Bag().embed, ids).detach()
    of_ids = lrpfx.explain(Product(), ids, 1, rules="epsilon_all")
    of_vectors = lrpfx.explain(ProductOfVectors(), vectors, 1, rules="epsilon_all")
    torch.testing.assert_close(of_ids.embeddings, of_vectors.relevance)
    torch.testing.assert_close(of_ids.relevance, of_vectors.relevance.sum(-1))


@pytest.mark.parametrize("form", [(), (4,), (2, 3)])
def test_rows_of_a_parameter_that_ids_pick(form: tuple[int, ...]) -> None:
    class Model(Bag):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(10, *form, dtype=torch.float64))

        def forward(self, ids: Tensor) -> Tensor:
            rows = self.table[ids].flatten(2).sum(-1) if form else self.table[ids]
            return self.head(self.embed(ids).sum(1)) + rows.sum(1, keepdim=True)

    model, ids = Model(), torch.tensor([[1, 2, 3], [4, 4, -1 % 10]])
    e = lrpfx.explain(model, ids, 1, rules=composites.EpsilonAll(1e-12))
    expected = model.embed(ids) @ model.head.weight[1]
    expected = expected + model.table.reshape(10, -1).sum(1)[ids]
    torch.testing.assert_close(e.relevance, expected.detach())
    width = model.table[0].numel()
    assert e.embeddings.shape == (2, 3, 4 if width == 4 else 4 + width)


@pytest.mark.parametrize("token", [0, 3, 9])
@pytest.mark.parametrize(
    "put",
    [
        lambda ids, token: F.pad(ids, (1, 0), value=token),
        lambda ids, token: torch.cat([torch.full((len(ids), 1), token), ids], 1),
    ],
)
def test_tokens_that_the_model_puts_in_belong_to_nobody(put: Callable, token: int) -> None:
    class Model(Bag):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(put(ids, token)).sum(1))

    model, ids = Model(), torch.tensor([[1, 2, 3], [4, 4, 0]])
    e = lrpfx.explain(model, ids, 1, rules=composites.EpsilonAll(1e-12))
    expected = (model.embed(ids) @ model.head.weight[1]).detach()
    torch.testing.assert_close(e.relevance, expected)


def test_a_table_that_is_an_input_gets_what_its_rows_get() -> None:
    class Model(Bag):
        def forward(self, ids: Tensor, table: Tensor) -> Tensor:
            return self.head(F.embedding(ids, table, padding_idx=2).sum(1))

    model, ids = Model(), torch.tensor([[1, 2, 3], [4, 4, 0]])
    table = torch.randn(6, 4, dtype=torch.float64)
    e = lrpfx.explain(model, (ids, table), 1, rules=composites.EpsilonAll(1e-12))
    of_ids, of_table = e.relevance
    times = torch.bincount(ids.flatten(), minlength=6)[:, None]
    assert of_ids is None
    torch.testing.assert_close(of_table, (times * table * model.head.weight[1]).detach())


@pytest.mark.parametrize(
    "mixed", [lambda ids: ids.cumsum(1) % 9, lambda ids: (ids + ids.flip(1)) % 9]
)
def test_embeddings_of_ids_that_were_mixed_are_said_to_be_constants(mixed: Callable) -> None:
    class Hashed(Bag):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head((self.embed(ids) + self.embed(mixed(ids))).sum(1))

    e = lrpfx.explain(Hashed(), torch.tensor([[1, 2, 3], [4, 4, 0]]), 1, rules="epsilon_all")
    (note,) = [note for note in e.report.notes if "one by one" in note]
    assert note.endswith("count as constants: embed@1")


def test_a_token_that_is_left_out_gets_nothing_and_one_used_twice_both() -> None:
    class Model(Bag):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head((self.embed(ids[:, 1:]) + self.embed(ids[:, :2])).sum(1))

    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    e = lrpfx.explain(Model(), ids, 1, rules=composites.EpsilonAll(1e-12))
    value = (Bag().embed(ids) @ Bag().head.weight[1]).detach()
    torch.testing.assert_close(e.relevance, value * torch.tensor([1.0, 2.0, 1.0]).double())


def test_a_row_that_is_masked_whole_is_zero() -> None:
    """As left padding gives: the fused kernel returns zeros there, and no relevance flows."""
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    mask[1, ..., 0] = False
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64)

    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask).sum((1, 2))

    for rules in ("attnlrp", "cplrp"):
        e = lrpfx.explain(Masked(), (x, mask), 1, rules=rules)
        torch.testing.assert_close(e.output, Masked()(x, mask))
        assert e.relevance[0][1, 0, 0].abs().max() == 0
        assert abs(e.report.unaccounted) < 1e-9


def test_stopping_attention_by_hand_keeps_the_default_for_the_rest() -> None:
    """The default is picked by the whole graph, not by what is left after the stop."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(1, 4, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            return by_hand(tokens, tokens, tokens).mean(1)

    model, x = Patches(), torch.randn(2, 1, 6, 6)
    stopped = lrpfx.explain(model, x, 1, rules=[("softmax", lrpfx.Stop())])
    assert {row.rule for row in stopped.report.rows if row.kind == "conv"} == {"Epsilon(epsilon=0)"}
    cp = lrpfx.explain(model, x, 1, rules="cplrp")
    torch.testing.assert_close(stopped.relevance, cp.relevance)


BEHIND_A_MASK: dict[str, Callable] = {
    "view": lambda s, v: (s.view(-1, 1, 5, 5).softmax(-1) @ v[:, None])[:, 0],
    "sink": lambda s, v: torch.cat([s, s.new_zeros(len(s), 5, 1)], -1).softmax(-1)[..., :5] @ v,
    "scale": lambda s, v: (s / 2).softmax(-1) @ v,
    "single precision": lambda s, v: s.float().softmax(-1).double() @ v,
    "soft cap": lambda s, v: (3 * torch.tanh(s / 3)).softmax(-1) @ v,
    "live bias": lambda s, v: (s + v[..., :1]).softmax(-1) @ v,
    "two masks": lambda s, v: torch.stack([s, s]).sum(0).softmax(-1) @ v,
}


@pytest.mark.parametrize("behind", BEHIND_A_MASK.values(), ids=BEHIND_A_MASK)
def test_what_stands_between_mask_and_softmax(behind: Callable) -> None:
    """A mask of -infinity gives what one of large numbers gives."""
    torch.manual_seed(0)
    q, k, v = (nn.Linear(4, 4).double() for _ in range(3))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    seen = torch.ones(5, 5).tril() > 0

    def masked(by: float) -> nn.Module:
        mask = torch.zeros(5, 5).double().masked_fill(~seen, by)
        return Apply(lambda m, x: behind(q(x) @ k(x).mT + mask, v(x)).mean(1))

    models, ways = (masked(-torch.inf), masked(-1e9)), ("export", "record")
    with traced_once():
        pairs = [
            [lrpfx.Explainer(m, x, rules, capture=c) for m, c in zip(models, ways, strict=True)]
            for rules in ("attnlrp", "epsilon_all")
        ]
    for pair, ledger in itertools.product(pairs, (True, False)):
        got, expected = (explainer(x, 1, ledger=ledger) for explainer in pair)
        torch.testing.assert_close(got.relevance, expected.relevance, rtol=1e-6, atol=1e-8)
        assert not ledger or abs(got.report.unaccounted) < 1e-9
