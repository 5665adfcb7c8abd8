"""The models that the examples explain, against formulas written here."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.bert import modeling_bert

import lrpfx
from lrpfx.composites import AttnLRP
from tests.capture.test_transformers import Secant, attention, half, layer_norm
from tests.oracle.families import draw, error

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


@pytest.fixture(scope="module")
def sentences() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import sentences

        yield sentences


def encoder(implementation: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.BertModel(tf.BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES))
        draw(model)
    model.set_attn_implementation(implementation)
    return model.double().eval()


def pair() -> dict[str, Tensor]:
    """Two sentences with another two; two of them are padded."""
    g = torch.Generator().manual_seed(1)
    first = torch.randint(0, 50, (2, 7), generator=g)
    second = torch.randint(0, 50, (2, 5), generator=g)
    mask, second_mask = torch.ones_like(first), torch.ones_like(second)
    mask[0, 5:] = 0
    second_mask[1, 3:] = 0
    return dict(first=first, mask=mask, second=second, second_mask=second_mask)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_similarity_of_sentences_by_modified_gradients(
    implementation: str, sentences: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = pair()
    model = sentences.Similarity(encoder(implementation))
    got = lrpfx.explain(model.eval(), inputs, rules=AttnLRP(epsilon=1e-12))
    output, (first, second) = by_modified_gradients(encoder("eager"), inputs, monkeypatch)
    assert (got.output - output).abs().max() < 1e-9
    assert error(got.relevance["first"], first) < 1e-6
    assert error(got.relevance["second"], second) < 1e-6
    assert got.relevance["mask"] is None and got.relevance["second_mask"] is None
    assert not got.relevance["first"][0, 5:].any() and not got.relevance["second"][1, 3:].any()


def by_modified_gradients(
    bert: Any, inputs: dict[str, Tensor], patch: pytest.MonkeyPatch
) -> tuple[Tensor, list[Tensor]]:
    """The cosine, and AttnLRP at epsilon = 0 as the words' embeddings times a gradient.

    In it lengths and standard deviations are constants, activations have the slope of their secant,
    and the factors of a product share evenly, those of the cosine's sum too.
    """
    patch.setattr(modeling_bert, "eager_attention_forward", attention)
    for layer in list(bert.modules()):
        if isinstance(layer, nn.LayerNorm):
            layer.forward = functools.partial(layer_norm, layer)
        elif isinstance(layer, modeling_bert.BertIntermediate):
            layer.intermediate_act_fn = Secant(layer.intermediate_act_fn)
    words, means = [], []
    for ids, mask in (("first", "mask"), ("second", "second_mask")):
        embedded = bert.get_input_embeddings()(inputs[ids]).detach().requires_grad_()
        hidden = bert(inputs_embeds=embedded, attention_mask=inputs[mask]).last_hidden_state
        kept = inputs[mask].unsqueeze(-1).double()
        words.append(embedded)
        means.append((hidden * kept).sum(1) / kept.sum(1))
    u, v = means
    lengths = [mean.norm(dim=-1, keepdim=True).detach() for mean in means]
    cosine = half((means[0] / lengths[0]) * (means[1] / lengths[1])).sum(-1)
    gradients = torch.autograd.grad(cosine.sum(), words)
    return cosine.detach(), [
        (w * g).sum(-1).detach() for w, g in zip(words, gradients, strict=True)
    ]


@pytest.mark.nightly
def test_the_audit_finds_the_mark_and_takes_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import audit

    audit.main(tmp_path)
    told = capsys.readouterr().out
    trained, corrected = (
        [float(n) for n in re.findall(r"([\d.]+)%", line)]
        for line in told.splitlines()
        if " accuracy: " in line
    )
    assert trained[0] > 97 and trained[1] < 80
    assert corrected[0] > 97 and corrected[1] > 97
    assert "agrees with the mark on 100.0%" in told and "8 of its 8 references" in told
    assert "100% of its nearest are marked" in told and " 0% of its nearest are marked" in told
    for name in ("audit.png", "concepts.html", "strategies.html"):
        assert (tmp_path / name).stat().st_size > 10_000
