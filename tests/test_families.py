"""Every family of tests/families.py: capture, forward, ledger, conservation, lengths, dtypes.

Tolerances stand beside the numbers measured; relevance is compared as whole maps, in the Euclidean
norm, because single entries cancel to almost nothing.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from tests.conftest import assert_untouched
from tests.families import (
    FAMILIES,
    IMAGE,
    RULES,
    assert_closes,
    best,
    error,
    explained,
    explainer_of,
    families,
    implementations,
    implemented,
    inputs_of,
    model_of,
    relevance_of,
    sample,
    target_of,
)

# isort: split
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TOLERANCE_OF_BATCHES = 1e-9
# Mamba's scan is unrolled, images have one size, and CLIP has images.
OF_ANY_LENGTH = [family for family in FAMILIES if family not in ("mamba", *IMAGE)]


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
    assert len(report.rows) > 50 and not report.unsupported
    assert all(row.rule and row.why for row in report.rows)
    assert not [note for note in report.notes if "batch" in note]


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


@pytest.mark.parametrize("family", [f for f in FAMILIES if best(f) == "sdpa"])
def test_eager_and_fused_attention_agree(family: str) -> None:
    eager, fused = (relevance_of(explained(family, i, "attnlrp")) for i in ("eager", "sdpa"))
    assert error(fused, eager) < 1e-5  # measured: 4e-7, where the eager softmax is in float32


@implementations
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "bert", "t5"])
def test_one_graph_for_every_batch_size(family: str, implementation: str) -> None:
    explainer, target = explainer_of(family, implementation, "attnlrp"), target_of(family)
    inputs = inputs_of(family, 3)
    relevance = relevance_of(explainer(inputs, target))
    assert len(relevance) == 3
    for i in range(3):
        alone = relevance_of(explainer(sample(inputs, i), target))
        assert error(alone, relevance[i : i + 1]) < TOLERANCE_OF_BATCHES


# Lengths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", OF_ANY_LENGTH)
def test_one_graph_for_every_length(family: str) -> None:
    model, target = model_of(family, best(family)), target_of(family)
    shorter = inputs_of(family, tokens=5)
    explainer = lrpfx.Explainer(model, inputs_of(family), RULES["attnlrp"], dynamic=(1,))
    fresh = explained(family, best(family), "attnlrp")
    got = explainer(inputs_of(family), target)
    assert error(relevance_of(got), relevance_of(fresh)) < 1e-9
    fresh = lrpfx.explain(model, shorter, target, rules=RULES["attnlrp"])
    got = explainer(shorter, target)
    assert error(relevance_of(got), relevance_of(fresh)) < 1e-9
    assert_closes(got.report)


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
    model = without_constants(family)
    inputs = inputs_of(family)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    rules = RULES["mambalrp" if family == "mamba" else "cplrp, gate stop"]
    explanation = lrpfx.explain(model, inputs, target_of(family), rules=rules)
    seeds = target_of(family)(explanation.output)
    # Measured: 2e-10, or 6e-7 where norms are rounded to float32 (Llama and its kin, Mamba).
    assert (explanation.absorbed.abs() < 1e-6 * seeds.abs()).all()


@torch.no_grad()
def without_constants(family: str) -> nn.Module:
    """Copy the model, with all that is added to its stream and not of the input set to zero."""
    model = copy.deepcopy(model_of(family, best(family)))
    added = ("bias", "position", "wpe", "token_type", "cls_token", "class_embedding")
    for name, parameter in model.named_parameters():
        if any(part in name for part in added) and "relative" not in name:  # these go into scores
            parameter.zero_()
    return model


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit"])
def test_what_cplrp_absorbs_is_in_the_biases(family: str) -> None:
    explanation = explained(family, best(family), "cplrp, gate stop")
    seeds = target_of(family)(explanation.output)
    assert (explanation.absorbed.abs() > 1e-3 * seeds.abs()).all()


# Dtypes, and what is left behind -----------------------------------------------------------------


@families
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


@families
def test_half_precision(family: str) -> None:
    """bfloat16 has 8 bits: a relative error of 4e-3 at each op, and more where summands cancel."""
    rules = rules_of(family)
    relevance = relevance_of(explained(family, best(family), rules, torch.bfloat16))
    expected = relevance_of(explained(family, best(family), rules))
    assert relevance.dtype == torch.bfloat16 and relevance.isfinite().all()
    pair = relevance.double().flatten(1), expected.flatten(1)
    # Measured: 0.969 for ViT, whose 192 values per patch are mixed by the patch embedding, and
    # 0.996 or more for all others.
    assert torch.cosine_similarity(*pair).min() > (0.9 if family == "vit" else 0.98)


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
