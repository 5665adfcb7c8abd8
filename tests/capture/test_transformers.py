"""Hugging Face transformers under AttnLRP, CP-LRP and MambaLRP, beside independent forms of these.

Norms of Llama and its kin, and their eager softmax, compute in float32 whatever the model's dtype:
numbers agree to about 1e-7 where the two sides round differently.
"""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from tests.oracle.families import (
    RULES,
    assert_closes,
    both,
    error,
    explained,
    inputs_of,
    marked,
    model_of,
    relevance_of,
    target_of,
)

pytestmark = pytest.mark.usefixtures("each_way")

# Families whose modified gradients are written out below.
WRITTEN_OUT = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2", "opt", "t5"]

# CP-LRP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["stop", "uniform"])
@both("llama", "gemma", "gpt2", "bert")
def test_the_ledger_of_cplrp_closes(family: str, implementation: str, gate: str) -> None:
    explanation = explained(family, implementation, f"cplrp, gate {gate}")
    assert_closes(explanation.report)
    assert "softmax" not in explanation.report.absorbed  # constant weights have no expansion
    kinds = {row.kind for row in explanation.report.rows}
    assert "softmax" not in kinds
    gates = [row for row in explanation.report.rows if "gate_proj" in row.module]
    assert bool(gates) == (gate == "uniform" and family in ("llama", "gemma"))


@both("llama", "gemma", "gpt2")
def test_gate_policies_of_cplrp_differ_where_there_are_gates(
    family: str, implementation: str
) -> None:
    stop, uniform = (
        relevance_of(explained(family, implementation, f"cplrp, gate {gate}"))
        for gate in ("stop", "uniform")
    )
    if family == "gpt2":
        assert torch.equal(stop, uniform)
    else:
        assert error(uniform, stop) > 0.05


# Parity with gradient times input ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        marked(family, implementation)
        for family in WRITTEN_OUT
        for implementation in ("eager", "sdpa")
    ],
)
def test_attnlrp_is_a_modified_gradient(
    family: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_modified_gradients(family, monkeypatch)
    got = explained(family, implementation, "attnlrp")
    assert set(expected) == {k for k, v in got.embeddings.items() if v is not None}
    for key, value in expected.items():
        assert error(got.embeddings[key], value) < 1e-6
        assert error(got.relevance[key], value.sum(-1)) < 1e-6


@pytest.mark.parametrize("gate", ["stop", "uniform"])
@both("llama", "gemma", "gpt2", "t5")
def test_cplrp_is_a_modified_gradient(
    family: str, implementation: str, gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_modified_gradients(family, monkeypatch, taylor=False, gate=gate)
    got = explained(family, implementation, f"cplrp, gate {gate}")
    for key, value in expected.items():
        assert error(got.embeddings[key], value) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_are_explained_at_their_embeddings(family: str) -> None:
    inputs = inputs_of(family)
    ids = inputs.pop("input_ids")
    model = model_of(family, "sdpa")
    inputs = dict(inputs_embeds=model.get_input_embeddings()(ids).detach(), **inputs)
    got = relevance_of(lrpfx.explain(model, inputs, target_of(family), rules=RULES["attnlrp"]))
    of_ids = explained(family, "sdpa", "attnlrp")
    assert error(of_ids.embeddings["input_ids"], got) < 1e-9


@pytest.mark.parametrize("family", [marked(f) for f in [*WRITTEN_OUT, "mamba"]])
def test_the_modified_gradients_belong_to_the_same_function(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = model_of(family, "eager"), inputs_of(family)
    with torch.no_grad():
        expected = model(**inputs).logits
        got = with_modified_gradients(model, monkeypatch)(**inputs).logits
    assert (got - expected).abs().max() < 1e-5


def test_mambalrp_is_a_modified_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the scan are rounded to float32 in the model, and not in the form below."""
    expected = by_modified_gradients("mamba", monkeypatch)["input_ids"]
    got = explained("mamba", "eager", "mambalrp")
    assert error(got.embeddings["input_ids"], expected) < 1e-5
    assert error(got.relevance["input_ids"], expected.sum(-1)) < 1e-5
    assert_closes(got.report)


def test_mambalrp_differs_from_attnlrp() -> None:
    mamba, attn = (relevance_of(explained("mamba", "eager", r)) for r in ("mambalrp", "attnlrp"))
    assert error(attn, mamba) > 0.05


def test_mambalrp_finds_the_projection_of_a_block_by_itself_or_says_so() -> None:
    class Block(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.name = name
            self.add_module(name, nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.get_submodule(self.name)(x)

    x = torch.randn(2, 4)
    attnlrp, mambalrp = (
        lrpfx.explain(Block("x_proj"), x, 1, rules=rules) for rules in ("attnlrp", "mambalrp")
    )
    assert not torch.allclose(attnlrp.relevance, mambalrp.relevance)
    other = lrpfx.explain(Block("other"), x, 1, rules="mambalrp").report
    assert any("x_proj" in note for note in other.notes)


def by_modified_gradients(
    family: str, monkeypatch: pytest.MonkeyPatch, **how: Any
) -> dict[str, Tensor]:
    """The rules at epsilon = 0: input times a gradient in which some ops count for less.

    In AttnLRP the softmax keeps its gradient: that is what its expansion amounts to, and biases,
    positions and masks get nothing by themselves, because relevance is taken at the embeddings
    only.
    """
    model, inputs = model_of(family, "eager"), inputs_of(family)
    embeds: dict[str, Tensor] = {}
    for key in ("input_ids", "decoder_input_ids"):
        if key in inputs:
            x = model.get_input_embeddings()(inputs.pop(key)).detach().requires_grad_()
            embeds[key] = inputs[key.replace("input_ids", "inputs_embeds")] = x
    with monkeypatch.context() as patch:
        modified = with_modified_gradients(model, patch, **how)
        seed = target_of(family)(modified(**inputs)).sum()
        gradients = torch.autograd.grad(seed, list(embeds.values()))
    return {k: (x * g).detach() for (k, x), g in zip(embeds.items(), gradients, strict=True)}


def with_modified_gradients(
    model: nn.Module, patch: pytest.MonkeyPatch, taylor: bool = True, gate: str = "uniform"
) -> nn.Module:
    """Copy the model, and patch the attention of its family as long as ``patch`` lasts.

    Args:
        taylor: Attention weights are live, as in AttnLRP, or constants, as in CP-LRP.
        gate: "stop" makes act(gate) a constant, "uniform" halves its product.
    """
    modified = copy.deepcopy(model)
    place = sys.modules[type(model).__module__]
    if hasattr(place, "eager_attention_forward"):
        patch.setattr(place, "eager_attention_forward", functools.partial(attention, taylor=taylor))
    for layer in list(modified.modules()):
        kind = type(layer).__name__
        if kind == "GemmaRMSNorm":
            layer.forward = functools.partial(rms_norm, layer, layer.eps, 1.0)
        elif kind.endswith("RMSNorm"):
            layer.forward = functools.partial(rms_norm, layer, layer.variance_epsilon, 0.0)
        elif kind == "T5LayerNorm":
            layer.forward = functools.partial(t5_norm, layer)
        elif kind == "LayerNorm":
            layer.forward = functools.partial(layer_norm, layer)
        elif kind == "MambaMixer":
            layer.forward = functools.partial(mixer, layer)
        elif kind == "GPT2MLP":
            layer.act = Secant(layer.act)
        elif kind.endswith("MLP"):
            layer.act_fn = Secant(layer.act_fn)
            layer.forward = functools.partial(gated, layer, gate)
        # The gradient of ReLU, which OPT and T5 have, is f(x) / x already.
    return modified


def half(x: Tensor) -> Tensor:
    """Return x, with half of its gradient."""
    return 0.5 * x + 0.5 * x.detach()


class Secant(nn.Module):
    """f(x) with f(x) / x in place of its derivative."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.where(x == 0, 0.0, self.f(x) / x).detach()  # masked tokens are zero


def rms_norm(layer: Any, epsilon: float, shift: float, x: Tensor) -> Tensor:
    """RMSNorm with a constant denominator, in float32 as in the original."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + epsilon).detach()
    return (x32 * scale).to(x.dtype) * (shift + layer.weight)


def layer_norm(layer: Any, x: Tensor) -> Tensor:
    """LayerNorm with a constant denominator; the mean keeps its gradient."""
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + layer.eps).detach()
    return centred * scale * layer.weight + layer.bias


def t5_norm(layer: Any, x: Tensor) -> Tensor:
    """RMSNorm with a constant denominator, of which only that is in float32."""
    variance = x.float().square().mean(-1, keepdim=True)
    return x * torch.rsqrt(variance + layer.variance_epsilon).detach() * layer.weight


def gated(layer: Any, gate: str, x: Tensor) -> Tensor:
    """The two factors of act(gate) * up share evenly, or up takes all."""
    act, up = layer.act_fn(layer.gate_proj(x)), layer.up_proj(x)
    return layer.down_proj(act.detach() * up if gate == "stop" else half(act * up))


def mixer(layer: Any, x: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
    """A Mamba block whose discretised A, B and C are constants; SiLU by f(x) / x, gate halved."""
    silu = Secant(F.silu)
    n, tokens, _width = x.shape
    seen = attention_mask[..., None]
    states, rank = layer.ssm_state_size, layer.time_step_rank
    u, z = layer.in_proj(x * seen).split(layer.intermediate_size, -1)
    u = silu(layer.conv1d(u.mT)[..., :tokens].mT) * seen
    steered = layer.x_proj(u).detach()
    dt, B, C = steered.split([rank, states, states], -1)
    dt = F.softplus(layer.dt_proj(dt))
    A = (dt[..., None] * -layer.A_log.exp()).exp()  # (n, tokens, width, states)
    h = x.new_zeros(n, layer.intermediate_size, states)
    y = []
    for t in range(tokens):
        h = A[:, t] * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1) + layer.D * u[:, t])
    return layer.out_proj(half(torch.stack(y, 1) * silu(z)))


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | float = 0.0,
    taylor: bool = True,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention whose two matrix products share evenly: q and k get a quarter, v a half.

    Unless ``taylor``, the weights are constants and v gets all.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = half(query @ key.transpose(-1, -2)) * scaling + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    mixed = half(weights @ value) if taylor else weights.detach() @ value
    return mixed.transpose(1, 2).contiguous(), weights


@pytest.mark.parametrize("ledger", [True, False])
def test_blocks_of_a_llama_are_layers(ledger: bool) -> None:
    """Their norms are written by hand, of statistics that are constants."""
    model, inputs, seen = model_of("llama", "sdpa"), inputs_of("llama"), dict[str, Tensor]()

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, out: seen.update({name: out if len(out) else out[0]})

    paths = ["model.layers.0", "model.layers.1", "model.layers.1.mlp", "model.norm"]
    handles = [model.get_submodule(p).register_forward_hook(keep(p)) for p in paths]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    explanation = lrpfx.explain(
        model,
        inputs,
        target_of("llama"),
        rules=RULES["cplrp, gate stop"],
        layers=["model.layers.*", "model.norm"],
        ledger=ledger,
    )
    assert set(paths) <= set(explanation.layers)
    for path in paths:
        torch.testing.assert_close(explanation.layers[path].activation, seen[path])
    through = [explanation.layers[path].relevance.sum() for path in paths if "mlp" not in path]
    assert all(r == pytest.approx(explanation.seed.sum()) for r in through)
