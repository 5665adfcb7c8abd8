"""inseq's own models call lrpfx, for decoders and for encoders with decoders."""

import functools
from typing import Any

import pytest
import torch

import lrpfx
from tests.conftest import assert_untouched

inseq = pytest.importorskip("inseq", reason="pip install 'lrpfx[inseq]'")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lrpfx.adapters.inseq import LRPAttribution  # noqa: E402

WORDS = ["<s>", "</s>", "<pad>", "<unk>", "the", "old", "dog", "ran", "home", "again"]


@functools.cache
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_each_token_of_a_decoder_is_explained_by_those_before_it() -> None:
    model = decoder()
    with assert_untouched(model.model):
        loaded = inseq.load_model(model, "lrp", tokenizer=tokenizer(), rules="cplrp")
        assert isinstance(loaded.attribution_method, LRPAttribution)
        out = loaded.attribute(
            "the old dog", "the old dog ran home", attributed_fn="logit", show_progress=False
        )
    (found,) = out.sequence_attributions
    scores = found.target_attributions  # (tokens so far, tokens that are explained)
    ids = tokenizer()("the old dog ran home", return_tensors="pt").input_ids
    for step, position in enumerate((3, 4)):
        inputs = {"input_ids": ids[:, :position], "use_cache": False}
        target = (-1, int(ids[0, position]))
        plain = lrpfx.explain(model, inputs, target, rules="cplrp").relevance["input_ids"]
        torch.testing.assert_close(scores[:position, step].float(), plain[0], rtol=1e-3, atol=1e-5)
    assert "home" in out.show(display=False, return_html=True, do_aggregate=False)


@pytest.mark.nightly
def test_encoders_with_decoders_have_relevance_of_source_and_prefix() -> None:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=10, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, bos_token_id=0,
        eos_token_id=1, pad_token_id=2, decoder_start_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    loaded = inseq.load_model(model, "lrp", tokenizer=tokenizer())
    out = loaded.attribute("the old dog", "ran home", attribute_target=True, show_progress=False)
    (found,) = out.sequence_attributions
    assert found.source_attributions.abs().sum() > 0
    assert found.target_attributions.nan_to_num().abs().sum() > 0
