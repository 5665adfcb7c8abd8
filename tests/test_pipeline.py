"""A pipeline of transformers in the place of model and tokenizer."""

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lrpfx
from lrpfx import errors

transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "very"]


@functools.cache
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, sep_token="[SEP]", **special)


@functools.cache
def classifier() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
        id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    return pipeline("text-classification", model=model, tokenizer=tokenizer())


@pytest.mark.usefixtures("one_trace")
def test_texts_and_labels_of_a_classifier() -> None:
    pipe = classifier()
    texts = ["a very good film", "a bad film"]
    found = lrpfx.explain(pipe, texts, "POSITIVE", rules="cplrp")
    inputs = dict(tokenizer()(texts, padding=True, return_tensors="pt"))
    plain = lrpfx.explain(pipe.model, inputs, 1, rules="cplrp", wrt="input_ids")
    torch.testing.assert_close(found.relevance["input_ids"], plain.relevance["input_ids"])
    shown = found.show_tokens(pipe, skip_special=True).to_html()
    assert "good" in shown and "[PAD]" not in shown
    with pytest.raises(errors.TargetError, match="its labels are NEGATIVE, POSITIVE"):
        lrpfx.explain(pipe, texts, "NEUTRAL")


@pytest.mark.usefixtures("one_trace")
def test_an_explainer_takes_texts_of_any_length_and_tensors() -> None:
    pipe = classifier()
    explainer = lrpfx.Explainer(pipe, "a good film", "cplrp")
    one = explainer("a very very good film", "NEGATIVE")
    assert one.relevance["input_ids"].shape == (1, 7)
    again = explainer(one.inputs, 0)
    assert torch.equal(again.relevance["input_ids"], one.relevance["input_ids"])
    assert explainer.model is pipe.model


def test_a_pair_of_texts_is_taken_as_pipelines_take_it() -> None:
    pair = {"text": "a good film", "text_pair": "very bad"}
    found = lrpfx.explain(classifier(), pair, "POSITIVE", rules="cplrp")
    inputs = tokenizer()("a good film", "very bad", return_tensors="pt")
    assert torch.equal(found.inputs["input_ids"], inputs["input_ids"])
    assert found.relevance["input_ids"].shape == inputs["input_ids"].shape


def test_what_was_kept_of_an_explainer_takes_texts_and_labels(tmp_path: Path) -> None:
    pipe, path = classifier(), tmp_path / "e.lrpfx"
    explainer = lrpfx.Explainer(pipe, "a good film", "cplrp", capture="record")
    explainer.save(path)
    again = [
        pickle.loads(pickle.dumps(explainer)),
        copy.deepcopy(explainer),
        lrpfx.Explainer.load(path, pipe),
    ]
    expected = explainer(["a bad film", "a very good film"], "POSITIVE").relevance["input_ids"]
    for each in again:
        found = each(["a bad film", "a very good film"], "POSITIVE")
        assert torch.equal(found.relevance["input_ids"], expected)
    with pytest.raises(errors.InputError, match="a pipeline of transformers in the place"):
        lrpfx.Explainer.load(path, pipe.model)("a good film")


@pytest.mark.nightly
def test_an_explainer_of_texts_is_exported_by_a_text(tmp_path: Path) -> None:
    explainer = lrpfx.Explainer(classifier(), "a good film", "cplrp")
    lrpfx.export(explainer, tmp_path / "model.pt2", "a good film")
    found = explainer("a very good film", "POSITIVE")
    program = torch.export.load(tmp_path / "model.pt2").module()
    _, relevance = program(**found.inputs, target=torch.tensor([1]))
    torch.testing.assert_close(relevance["input_ids"], found.relevance["input_ids"])


@pytest.mark.nightly
def test_language_models_are_called_without_caches() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer())
    found = lrpfx.explain(pipe, "a good", (-1, 7), rules="attnlrp")
    assert found.relevance["input_ids"].shape == (1, 4)


class Processed:
    """What image pipelines are, as far as they are read."""

    def __init__(self, tokenizer: Any, processor: Any) -> None:
        self.model = torch.nn.Conv2d(1, 2, 3, padding=1).eval()
        self.tokenizer, self.image_processor = tokenizer, processor

    def __call__(self) -> None: ...


class Picture:
    """As an image of PIL is."""

    def convert(self, mode: str) -> None: ...


def test_images_are_processed_and_what_cannot_be_is_refused() -> None:
    def processor(images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input": torch.from_numpy(np.ones((len(images), 1, 4, 4), dtype=np.float32))}

    pipe = Processed(None, processor)
    found = lrpfx.explain(pipe, [Picture(), Picture()], (1, 2, 2))
    assert found.relevance["input"].shape == (2, 1, 4, 4)
    with pytest.raises(errors.InputError, match="nothing that takes a str"):
        lrpfx.explain(pipe, "words")
