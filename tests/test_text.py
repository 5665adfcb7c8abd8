"""Tokens on a red and blue scale, safe in HTML and in a terminal."""

import re

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.text import token_text

IDS = torch.tensor([[0, 1, 2], [2, 2, 0]])
RELEVANCE = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
VOCABULARY = ["<b>", "to\x1b[2Jken", "Ġz"]


class Tokenizer:
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [VOCABULARY[i] for i in ids]


@pytest.mark.parametrize("tokenizer", [Tokenizer(), VOCABULARY.__getitem__, VOCABULARY])
def test_every_token_has_its_relevance(tokenizer: object) -> None:
    text = token_text(IDS, RELEVANCE, tokenizer)
    assert text.sentences[0] == (("<b>", 1.0), ("to\x1b[2Jken", -2.0), ("Ġz", 0.0))
    assert len(text.sentences) == 2


def test_red_speaks_for_and_blue_against_on_a_symmetric_scale() -> None:
    shown = token_text(IDS, RELEVANCE, VOCABULARY)._repr_html_()
    colours = [tuple(map(int, c)) for c in re.findall(r"rgb\((\d+),(\d+),(\d+)\)", shown)]
    positive, negative, zero, *rest = colours
    assert positive[0] == 255 and positive[1] == positive[2] < 255
    assert negative[2] == 255 and negative[0] == negative[1] < positive[1]
    assert zero == (255, 255, 255) and set(rest) == {zero}


def test_tokens_cannot_act() -> None:
    """Neither as HTML nor as control sequences."""
    text = token_text(IDS, RELEVANCE, VOCABULARY)
    assert "<b>" not in text._repr_html_() and "&lt;b&gt;" in text._repr_html_()
    assert "\x1b[2J" not in repr(text) and r"\x1b[2J" in repr(text)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1))


def test_an_explanation_shows_its_tokens() -> None:
    e = lrpfx.explain(Bag(), IDS, 1)
    shown = e.show_tokens(VOCABULARY)
    values = [[value for _, value in sentence] for sentence in shown.sentences]
    torch.testing.assert_close(torch.tensor(values), e.relevance)


def test_without_token_ids_there_is_nothing_to_show() -> None:
    e = lrpfx.explain(nn.Linear(3, 2), torch.randn(2, 3))
    with pytest.raises(lrpfx.errors.InputError, match="token ids"):
        e.show_tokens(VOCABULARY)


@pytest.mark.parametrize("tokenizer", [Tokenizer(), VOCABULARY[:2], {0: "a"}, {0: "a"}.__getitem__])
def test_a_vocabulary_that_lacks_an_id_is_named(tokenizer: object) -> None:
    with pytest.raises(lrpfx.errors.InputError, match="no token.*0 to 7"):
        token_text(torch.tensor([[0, 7]]), torch.zeros(1, 2), tokenizer)


def test_of_several_targets_one_can_be_shown() -> None:
    e = lrpfx.explain(Bag(), IDS, "all")
    with pytest.raises(lrpfx.errors.InputError, match="one target.* has 2"):
        e.show_tokens(VOCABULARY)
    assert token_text(IDS, e.relevance[1], VOCABULARY).sentences
