"""Caches and loops over experts of transformers' models, each against a spelling without them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lrpfx
from tests.conftest import Apply

IDS = torch.tensor([[3, 17, 8, 40, 11]])
_SIZES: dict[str, Any] = dict(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=32,
    pad_token_id=0,
)
_EXPERTS: dict[str, Any] = dict(_SIZES, num_experts_per_tok=2)


def _mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_EXPERTS, num_local_experts=4)
    )


def _qwen() -> Any:
    more = dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**_EXPERTS, **more))


def _gpt_oss() -> Any:
    more: dict[str, Any] = dict(num_local_experts=4, layer_types=["full_attention"])
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**_EXPERTS, **more))


def _llama(layers: int = 2) -> Any:
    sizes = dict(_SIZES, num_hidden_layers=layers)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def _spread(model: Any) -> Any:
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.3)
    return model.double().eval()


def _last(output: Any) -> Tensor:
    return output.logits[:, -1, 3]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make",
    [
        _mixtral,
        pytest.param(_qwen, marks=pytest.mark.nightly),
        pytest.param(_gpt_oss, marks=pytest.mark.nightly),
    ],
)
def test_loops_over_experts_are_explained_as_products_of_matrices(make: Callable[[], Any]) -> None:
    found = []
    for implementation, capture in (("eager", "record"), ("batched_mm", "export")):
        torch.manual_seed(0)
        model = _spread(make())
        model.set_experts_implementation(implementation)
        inputs = {"input_ids": IDS, "use_cache": False}
        explanation = lrpfx.explain(model, inputs, _last, capture=capture)  # type: ignore[arg-type]
        found.append(explanation.embeddings["input_ids"])
        looped = any("nonzero at" in note for note in explanation.report.notes)
        assert looped == (implementation == "eager")
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


def test_a_step_with_a_cache_is_explained_as_one_with_its_tensors() -> None:
    model = _spread(_llama())
    whole = lrpfx.explain(model, {"input_ids": IDS}, _last, capture="record")
    cache = lrpfx.explain(model, {"input_ids": IDS[:, :-1]}, _last).output.past_key_values
    assert isinstance(cache, transformers.DynamicCache)
    before = [layer.keys.clone() for layer in cache.layers]
    step = {"input_ids": IDS[:, -1:], "past_key_values": cache}
    explanation = lrpfx.explain(model, step, _last)
    assert all(map(torch.equal, before, [layer.keys for layer in cache.layers]))
    torch.testing.assert_close(explanation.output.logits, whole.output.logits[:, -1:])

    def forward(self: Any, ids: Tensor, *past: Tensor) -> Tensor:
        pairs = list(zip(past[::2], past[1::2], strict=True))
        made = transformers.DynamicCache(pairs)
        return self.model(input_ids=ids, past_key_values=made).logits  # type: ignore[no-any-return]

    past = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    inputs, target = (IDS[:, -1:], *past), (-1, 3)
    expected = lrpfx.explain(Apply(forward, model=model), inputs, target, capture="export")
    relevance = explanation.relevance["past_key_values"]
    got = [t for layer in relevance.layers for t in (layer.keys, layer.values)]
    assert all(t.abs().sum() > 1e-3 for t in got)
    torch.testing.assert_close(got, list(expected.relevance[1:]), rtol=1e-8, atol=1e-10)
    # What the last token gives by itself does not depend on where the others' keys come from.
    own = explanation.relevance["input_ids"]
    torch.testing.assert_close(own, whole.relevance["input_ids"][:, -1:])


@pytest.mark.parametrize("kind", ["sliding", pytest.param("static", marks=pytest.mark.nightly)])
@pytest.mark.nightly
def test_other_caches_are_explained_too(kind: str) -> None:
    if kind == "sliding":
        config = transformers.MistralConfig(**_SIZES, sliding_window=3)
        model = _spread(transformers.MistralForCausalLM(config))
        cache = transformers.DynamicCache(config=config)
    else:
        model = _spread(_llama(1))
        cache = transformers.StaticCache(config=model.config, max_cache_len=8)
    whole = lrpfx.explain(model, {"input_ids": IDS, "use_cache": False}, _last, capture="record")
    with torch.no_grad():
        model(input_ids=IDS[:, :-1], past_key_values=cache)
    step = {"input_ids": IDS[:, -1:], "past_key_values": cache}
    explanation = lrpfx.explain(model, step, _last)
    torch.testing.assert_close(explanation.output.logits, whole.output.logits[:, -1:])
    own = explanation.relevance["input_ids"]
    torch.testing.assert_close(own, whole.relevance["input_ids"][:, -1:], rtol=1e-6, atol=1e-9)
    held = explanation.relevance["past_key_values"].layers[0]
    assert held.values.abs().sum() > 1e-3
