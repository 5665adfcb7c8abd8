"""Every family of transformers: capture, forward, ledger, conservation, lengths, dtypes.

Tolerances stand beside the numbers measured; relevance is compared as whole maps, in the Euclidean
norm, because single entries cancel to almost nothing.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lrpfx
from tests.conftest import assert_untouched
from tests.oracle.families import (
    CAUSAL,
    FAMILIES,
    OF_ANY_LENGTH,
    RULES,
    assert_closes,
    best,
    both,
    error,
    explained,
    explainer_of,
    families,
    implemented,
    inputs_of,
    marked,
    model_of,
    relevance_of,
    sample,
    target_of,
)

pytestmark = pytest.mark.usefixtures("each_way")

TOLERANCE_OF_BATCHES = 1e-9
# One of each make: captures of their own for all of them would double the time.
#: Those of make nightly; in half precision, Llama and ViT stand in rules/test_dtypes.py.
SINGLE = {"llama", "t5", "vit"}
OTHER_DTYPES = ["llama", "mixtral", "gpt2", "opt", "mamba", "bert", "vit"]


def nightly_but(kept: set[str], families: Iterable[str]) -> list[Any]:
    """Cases of which only those that are kept run in the fast suite."""
    marks = pytest.mark.nightly
    return [f if f in kept else pytest.param(f, marks=marks) for f in families]


def rules_of(family: str) -> str:
    """Return rules under which numbers are well conditioned.

    Under AttnLRP the step of a Mamba block, softplus(x + bias), hands on relevance even where
    x + bias is zero, and so the relevance of x is out of all proportion near it: 5e-5 off in
    float32, without any meaning in bfloat16. MambaLRP takes the step as a constant.
    """
    return "mambalrp" if family == "mamba" else "attnlrp"


# Capture, forward, ledger, batches ---------------------------------------------------------------


@implemented
def test_the_forward_pass_is_the_models(family: str, implementation: str) -> None:
    model, inputs = model_of(family, implementation), inputs_of(family)
    explanation = explained(family, implementation, "attnlrp")
    with torch.no_grad():
        expected = model(**inputs)
    assert type(explanation.output) is type(expected)
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert (explanation.output[key] - value).abs().max() < 1e-9


@implemented
def test_every_live_op_has_a_rule(family: str, implementation: str) -> None:
    report = explainer_of(family, implementation, "attnlrp").report
    assert len(report.rows) > 25 and not report.unsupported
    assert all(row.rule and row.why for row in report.rows)
    noted = [note for note in report.notes if "batch" in note]
    # Each image is compared with the texts of all samples.
    assert not noted or family == "clip" and "depends on the others" in noted[0]


@implemented
def test_every_token_has_its_relevance(family: str, implementation: str) -> None:
    inputs = inputs_of(family)
    relevance = explained(family, implementation, "attnlrp").relevance
    live = {key: r for key, r in relevance.items() if r is not None}
    assert live.keys() == inputs.keys() - {"attention_mask", "use_cache"}
    for key, r in live.items():
        assert r.shape == inputs[key].shape and r.isfinite().all() and r.abs().sum() > 0
    if "attention_mask" in inputs and family != "mamba":  # which mixes what stands before
        masked = inputs["attention_mask"] == 0
        assert not relevance["input_ids"][masked].any(), "masked tokens are relevant"


@implemented
def test_the_ledger_closes(family: str, implementation: str) -> None:
    assert_closes(explained(family, implementation, "attnlrp").report)


@implemented
def test_a_batch_is_its_samples(family: str, implementation: str) -> None:
    explainer, inputs = explainer_of(family, implementation, "attnlrp"), inputs_of(family)
    together = relevance_of(explained(family, implementation, "attnlrp"))
    for i in range(2):
        alone = relevance_of(explainer(sample(inputs, i), target_of(family)))
        assert error(alone, together[i : i + 1]) < TOLERANCE_OF_BATCHES  # measured: 3e-14


@pytest.mark.parametrize(
    "family",
    [marked(f, of="eager") for f in FAMILIES if best(f) == "sdpa"],
)
def test_eager_and_fused_attention_agree(family: str) -> None:
    eager, fused = (relevance_of(explained(family, i, "attnlrp")) for i in ("eager", "sdpa"))
    assert error(fused, eager) < 1e-5  # measured: 4e-7, where the eager softmax is in float32


@both("llama", "mixtral", "gpt2", "bert", "t5")
def test_one_graph_for_every_batch_size(family: str, implementation: str) -> None:
    explainer, target = explainer_of(family, implementation, "attnlrp"), target_of(family)
    inputs = inputs_of(family, 3)
    relevance = relevance_of(explainer(inputs, target))
    assert len(relevance) == 3
    for i in range(3):
        alone = relevance_of(explainer(sample(inputs, i), target))
        assert error(alone, relevance[i : i + 1]) < TOLERANCE_OF_BATCHES


# Lengths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", nightly_but({"llama", "t5"}, OF_ANY_LENGTH))
def test_one_graph_for_every_length(family: str) -> None:
    """At the length of its example it is compared above with the eager graph of that length."""
    model, target = model_of(family, best(family)), target_of(family)
    explainer = explainer_of(family, best(family), "attnlrp")
    shorter, longer = inputs_of(family, tokens=5), inputs_of(family, tokens=9)
    got = explainer(shorter, target)
    fresh = lrpfx.explain(model, shorter, target, rules=RULES["attnlrp"])
    assert error(relevance_of(got), relevance_of(fresh)) < 1e-9
    assert_closes(got.report)
    with torch.no_grad():
        expected = model(**longer).logits
    assert (explainer(longer, target).output.logits - expected).abs().max() < 1e-9


@pytest.mark.parametrize("family", nightly_but({"bert"}, ["bert", "gpt2", "gemma2"]))
def test_at_the_length_of_the_example_it_is_the_graph_of_that_length(family: str) -> None:
    model, inputs = model_of(family, best(family)), inputs_of(family)
    fresh = lrpfx.explain(model, inputs, target_of(family), rules=RULES["attnlrp"])
    got = explained(family, best(family), "attnlrp")
    assert error(relevance_of(got), relevance_of(fresh)) < 1e-9


# Conservation ------------------------------------------------------------------------------------


@families
def test_cplrp_conserves(family: str) -> None:
    """Without biases and what else is added to the tokens' own stream, nothing is absorbed.

    Attention weights are constants, so what is added to scores does not matter; norms have a
    constant denominator. The routing weights of Mixtral and the gates of gated networks are
    constants as well; the cosine of CLIP is a product of two live streams which share evenly.
    Mamba has no attention: its MambaLRP conserves for the same reason, and CP-LRP would hand on
    relevance through exp and softplus, which are not zero at zero.
    """
    model = model_of(family, best(family))
    inputs, target = inputs_of(family), largest(family)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    rules = "mambalrp" if family == "mamba" else "cplrp, gate stop"
    explainer = explainer_of(family, best(family), rules)
    if added := added_to_the_stream(model):
        explanation = explainer(inputs, target)
        assert (explanation.absorbed.abs() > 1e-4 * target(explanation.output)).all()
    with zeroed(added):
        explanation = explainer(inputs, target)
    # Measured: 2e-10, or 6e-7 where norms are rounded to float32 (Llama and its kin, Mamba).
    assert (explanation.absorbed.abs() < 1e-6 * target(explanation.output)).all()


@contextmanager
def zeroed(parameters: list[nn.Parameter]) -> Iterator[None]:
    """For the time being, the parameters are zero."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
        try:
            yield
        finally:
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def added_to_the_stream(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are added to what comes of the input, but for those of scores."""
    names = ("bias", "position", "wpe", "token_type", "cls_token", "class_embedding")
    return [
        parameter
        for name, parameter in model.named_parameters()
        if any(part in name for part in names)
        and "relative" not in name  # T5 and Swin
        and not name.endswith(("q_proj.bias", "k_proj.bias"))  # these matter to scores alone
    ]


def largest(family: str) -> Callable[[Any], Tensor]:
    """The logit of largest size: to a logit near zero, any rounding is relatively large."""
    if family == "clip":
        return lambda output: output.logits_per_image.diagonal().abs()
    if family in CAUSAL:
        return lambda output: output.logits[:, -1].abs().amax(-1)
    return lambda output: output.logits.abs().amax(-1)


# Dtypes, and what is left behind -----------------------------------------------------------------


@pytest.mark.parametrize("family", nightly_but(SINGLE, [*OTHER_DTYPES, "t5", "swin", "clip"]))
def test_single_precision_and_the_model_is_left_as_it_was(family: str) -> None:
    rules = rules_of(family)
    model, target = model_of(family, best(family), torch.float32), target_of(family)
    inputs = inputs_of(family, dtype=torch.float32)
    gradients, code = gradients_of(model, inputs, target), code_of(model)
    with assert_untouched(model, inputs):
        got = lrpfx.explain(model, inputs, target, rules=RULES[rules])
    assert code_of(model) == code
    after = gradients_of(model, inputs, target)
    assert all(torch.equal(after[name], before) for name, before in gradients.items())
    relevance = relevance_of(got)
    assert relevance.dtype == torch.float32
    expected = relevance_of(explained(family, best(family), rules))
    assert error(relevance.double(), expected) < 1e-4  # measured: 1e-7 to 5e-6


@pytest.mark.parametrize("family", nightly_but({"mamba"}, OTHER_DTYPES))
def test_half_precision(family: str) -> None:
    """bfloat16 has 8 bits: a relative error of 4e-3 at each op, and more where summands cancel."""
    rules = rules_of(family)
    relevance = relevance_of(explained(family, best(family), rules, torch.bfloat16))
    expected = relevance_of(explained(family, best(family), rules))
    assert relevance.dtype == torch.bfloat16 and relevance.isfinite().all()
    pair = relevance.double().flatten(1), expected.flatten(1)
    # Measured: 0.996 for OPT, 0.999 or more for the others.
    assert torch.cosine_similarity(*pair).min() > 0.98


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
    code: dict[str, Any] = {f"attention {name}": f for name, f in ALL_ATTENTION_FUNCTIONS.items()}
    for place in (nn.functional, nn.Module, Tensor, torch.autograd, masking_utils):
        code |= {f"{place.__name__}.{name}": f for name, f in vars(place).items() if callable(f)}
    for cls in {type(module) for module in model.modules()}:
        code[f"{cls} forward"], code[f"{cls} call"] = cls.forward, cls.__call__
        place = vars(sys.modules[cls.__module__])
        code |= {f"{cls.__module__}.{name}": f for name, f in place.items() if callable(f)}
    return code
