"""Hugging Face transformers: captured as they are, and equal to an independent AttnLRP.

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
from torch import Tensor, nn

import lrpfx
from lrpfx.composites import CPLRP, AttnLRP, Composite
from tests import zoo
from tests.conftest import assert_untouched

# isort: split
# transformers imports torchvision, which cannot be imported everywhere before zoo has been.
import transformers as tf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TOLERANCE_OF_BATCHES = 1e-9
TOKENS, VOCABULARY = 7, 50
SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
)
TEXT = dict(SIZES, vocab_size=VOCABULARY, max_position_embeddings=16)
GROUPED = dict(TEXT, num_key_value_heads=2)  # two queries share a key, so keys are broadcast
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=16)
DISTILBERT = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=VOCABULARY)

CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(head_dim=8, **GROUPED)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(bos_token_id=0, eos_token_id=0, **GPT2)),
}
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**DISTILBERT)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(image_size=32, patch_size=8, **SIZES)),
}
FAMILIES = CAUSAL | CLASSIFIERS
# Families whose modified gradients are written out below.
WRITTEN_OUT = ["llama", "qwen2", "gemma", "gpt2"]

RULES: dict[str, Composite] = {
    "attnlrp": AttnLRP(),
    "attnlrp, epsilon 1e-10": AttnLRP(epsilon=1e-10),
    "attnlrp, epsilon 1e-12": AttnLRP(epsilon=1e-12),
    "cplrp, gate stop": CPLRP(gate="stop"),
    "cplrp, gate uniform": CPLRP(gate="uniform"),
}

families = pytest.mark.parametrize("family", list(FAMILIES))
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


@functools.cache
def model_of(family: str, implementation: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = FAMILIES[family]()
        draw(model)
    model.set_attn_implementation(implementation)
    return model.double().eval()


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Draw parameters that let every part matter.

    As initialised, attention is all but uniform, biases are zero and norms scale by one: a rule
    that forgets any of them would go unseen.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif "emb" in name or "wte" in name or "wpe" in name:
            parameter.normal_()
        else:
            parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)


@functools.cache
def explainer_of(family: str, implementation: str, rules: str) -> lrpfx.Explainer:
    model = model_of(family, implementation)
    return lrpfx.Explainer(model, inputs_of(family), RULES[rules])


@functools.cache
def explained(family: str, implementation: str, rules: str) -> lrpfx.Explanation:
    return explainer_of(family, implementation, rules)(inputs_of(family), target_of(family))


def inputs_of(family: str, n: int = 2) -> dict[str, Any]:
    """Return token ids and a mask, or images; every second sentence has two tokens masked.

    They are in the middle, so that the last token of a causal model is in the sentence and no
    token is left without any to attend to: transformers makes NaN of such rows in float64.
    """
    if family == "vit":
        return dict(pixel_values=zoo.images(n, 3, 32, 32))
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (n, TOKENS), generator=g)
    mask = torch.ones_like(ids)
    mask[1::2, 2:4] = 0
    inputs = dict(input_ids=ids, attention_mask=mask)
    return dict(inputs, use_cache=False) if family in CAUSAL else inputs


def sample(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    return {key: v[i : i + 1] if isinstance(v, Tensor) else v for key, v in inputs.items()}


def target_of(family: str) -> Callable[[Any], Tensor]:
    if family in CAUSAL:
        return lambda output: output.logits[:, -1, 7]
    return lambda output: output.logits[:, 1]


def relevance_of(explanation: lrpfx.Explanation) -> Tensor:
    """Return the relevance of the only explained input, which is the first one."""
    first, *others = explanation.relevance.values()
    assert isinstance(first, Tensor) and all(other is None for other in others)
    return first


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a sample, in the Euclidean norm."""
    assert got.shape == expected.shape and got.isfinite().all()
    norms = expected.flatten(1).norm(dim=1)
    assert (norms > 0).all()
    return float(((got - expected).flatten(1).norm(dim=1) / norms).max())


def assert_closes(report: lrpfx.explanation.Report) -> None:
    """Check that what started has reached the inputs or is booked as absorbed."""
    assert report.started is not None and report.reached is not None
    assert report.unaccounted is not None
    moved = [abs(report.started), *(abs(row.relevance_in or 0.0) for row in report.rows)]
    assert abs(report.unaccounted) < 1e-6 * max(moved)
    left = report.started - report.reached - sum(report.absorbed.values())
    assert left == pytest.approx(report.unaccounted, abs=1e-12 * max(moved))


# Capture, forward, ledger, batches ---------------------------------------------------------------


@implementations
@families
def test_the_forward_pass_is_the_models(family: str, implementation: str) -> None:
    inputs = inputs_of(family)
    with torch.no_grad():
        expected = model_of(family, implementation)(**inputs).logits
    got = explained(family, implementation, "attnlrp").output.logits
    assert (got - expected).abs().max() < 1e-9


@implementations
@families
def test_every_token_has_its_relevance(family: str, implementation: str) -> None:
    inputs = inputs_of(family)
    relevance = relevance_of(explained(family, implementation, "attnlrp"))
    assert relevance.shape == next(iter(inputs.values())).shape
    assert relevance.isfinite().all() and relevance.abs().sum() > 0
    if "attention_mask" in inputs:
        assert not relevance[inputs["attention_mask"] == 0].any(), "masked tokens are relevant"


@implementations
@families
def test_the_ledger_closes(family: str, implementation: str) -> None:
    assert_closes(explained(family, implementation, "attnlrp").report)


@implementations
@families
def test_a_batch_is_its_samples(family: str, implementation: str) -> None:
    explainer, inputs = explainer_of(family, implementation, "attnlrp"), inputs_of(family)
    together = relevance_of(explained(family, implementation, "attnlrp"))
    for i in range(2):
        alone = relevance_of(explainer(sample(inputs, i), target_of(family)))
        assert error(alone, together[i : i + 1]) < TOLERANCE_OF_BATCHES


@pytest.mark.parametrize(
    ("rules", "tolerance"),
    # Every division costs epsilon, and fused attention is taken apart into other ones.
    [("attnlrp", 1e-4), ("attnlrp, epsilon 1e-10", 1e-5)],
)
@families
def test_eager_and_fused_attention_agree(family: str, rules: str, tolerance: float) -> None:
    eager, fused = (relevance_of(explained(family, i, rules)) for i in ("eager", "sdpa"))
    assert error(fused, eager) < tolerance


@implementations
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_one_graph_for_every_batch_size(family: str, implementation: str) -> None:
    explainer, target = explainer_of(family, implementation, "attnlrp"), target_of(family)
    inputs = inputs_of(family, 3)
    relevance = relevance_of(explainer(inputs, target))
    assert len(relevance) == 3
    for i in range(3):
        alone = relevance_of(explainer(sample(inputs, i), target))
        assert error(alone, relevance[i : i + 1]) < TOLERANCE_OF_BATCHES


@implementations
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_model_and_transformers_stay_as_they_were(family: str, implementation: str) -> None:
    model, inputs, target = model_of(family, implementation), inputs_of(family), target_of(family)
    gradients, code = gradients_of(model, inputs, target), code_of(model)
    with assert_untouched(model, inputs):
        lrpfx.explain(model, inputs, target, rules=AttnLRP())
    assert code_of(model) == code
    after = gradients_of(model, inputs, target)
    assert all(torch.equal(after[name], before) for name, before in gradients.items())


def gradients_of(
    model: nn.Module, inputs: dict[str, Any], target: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(
        target(model(**inputs)).sum(), list(parameters.values()), allow_unused=True
    )
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def code_of(model: nn.Module) -> dict[str, Any]:
    """Return all functions and classes by which the model computes; they compare by identity."""
    code: dict[str, Any] = {"sdpa": nn.functional.scaled_dot_product_attention}
    code |= {f"attention {name}": f for name, f in ALL_ATTENTION_FUNCTIONS.items()}
    for cls in {type(module) for module in model.modules()}:
        code[f"{cls} forward"], code[f"{cls} call"] = cls.forward, cls.__call__
        place = vars(sys.modules[cls.__module__])
        code |= {f"{cls.__module__}.{name}": f for name, f in place.items() if callable(f)}
    return code


# CP-LRP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["stop", "uniform"])
@implementations
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "bert"])
def test_the_ledger_of_cplrp_closes(family: str, implementation: str, gate: str) -> None:
    explanation = explained(family, implementation, f"cplrp, gate {gate}")
    assert_closes(explanation.report)
    assert "softmax" not in explanation.report.absorbed  # constant weights have no expansion
    kinds = {row.kind for row in explanation.report.rows}
    assert "softmax" not in kinds
    gates = [row for row in explanation.report.rows if "gate_proj" in row.module]
    assert bool(gates) == (gate == "uniform" and family in ("llama", "gemma"))


@implementations
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
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


# Parity with AttnLRP as gradient times input -----------------------------------------------------


@pytest.mark.parametrize("family", WRITTEN_OUT)
@implementations
def test_parity_with_modified_gradients(
    family: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, target = inputs_of(family), target_of(family)
    ids = inputs.pop("input_ids")
    embeds = model_of(family, implementation).get_input_embeddings()(ids).detach()
    inputs = dict(inputs_embeds=embeds, **inputs)
    got = lrpfx.explain(
        model_of(family, implementation), inputs, target, rules=AttnLRP(epsilon=1e-12)
    )
    expected = by_modified_gradients(model_of(family, "eager"), inputs, target, monkeypatch)
    assert error(relevance_of(got), expected) < 1e-6
    of_ids = explained(family, implementation, "attnlrp, epsilon 1e-12")
    assert error(relevance_of(of_ids), relevance_of(got).sum(-1)) < 1e-6
    assert error(of_ids.embeddings["input_ids"], relevance_of(got)) < 1e-6


@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_the_modified_gradients_belong_to_the_same_function(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = model_of(family, "eager"), inputs_of(family)
    with torch.no_grad():
        expected = model(**inputs).logits
        got = with_modified_gradients(model, monkeypatch)(**inputs).logits
    assert (got - expected).abs().max() < 1e-5


def by_modified_gradients(
    model: nn.Module,
    inputs: dict[str, Any],
    target: Callable[[Any], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> Tensor:
    """AttnLRP at epsilon = 0: input times a gradient in which some ops count for less.

    The softmax keeps its gradient: that is what its expansion amounts to, and biases, positions
    and masks get nothing by themselves, because relevance is taken at the embeddings only.
    """
    x = inputs["inputs_embeds"].clone().requires_grad_()
    with monkeypatch.context() as patch:
        modified = with_modified_gradients(model, patch)
        seed = target(modified(**inputs | dict(inputs_embeds=x))).sum()
        (gradient,) = torch.autograd.grad(seed, x)
    return (x * gradient).detach()


def with_modified_gradients(model: nn.Module, patch: pytest.MonkeyPatch) -> nn.Module:
    """Copy the model, and patch the attention of its family as long as ``patch`` lasts."""
    modified = copy.deepcopy(model)
    patch.setattr(sys.modules[type(model).__module__], "eager_attention_forward", attention)
    for layer in list(modified.modules()):
        kind = type(layer).__name__
        if kind in ("LlamaRMSNorm", "Qwen2RMSNorm"):
            layer.forward = functools.partial(rms_norm, layer, layer.variance_epsilon, 0.0)
        elif kind == "GemmaRMSNorm":
            layer.forward = functools.partial(rms_norm, layer, layer.eps, 1.0)
        elif kind == "LayerNorm":
            layer.forward = functools.partial(layer_norm, layer)
        elif kind == "GPT2MLP":
            layer.act = Secant(layer.act)
        elif kind.endswith("MLP"):
            layer.act_fn = Secant(layer.act_fn)
            layer.forward = functools.partial(gated, layer)
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
        return x * (self.f(x) / x).detach()


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


def gated(layer: Any, x: Tensor) -> Tensor:
    """The two factors of act(gate) * up share evenly."""
    return layer.down_proj(half(layer.act_fn(layer.gate_proj(x)) * layer.up_proj(x)))


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention whose two matrix products share evenly: q and k get a quarter, v a half."""
    shared = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = half(query @ key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    return half(weights @ value).transpose(1, 2).contiguous(), weights
