"""Tokens on a red and blue scale, safe in HTML and in a terminal."""

import re
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace

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


class Typed(Bag):
    """Token types beside the tokens, as BERT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Embedding(2, 4)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.head((self.embed(input_ids) + self.kind(token_type_ids)).mean(1))


def test_of_several_inputs_that_are_looked_up_the_tokenizers_own_is_shown() -> None:
    """Also where they are given as a tokenizer gives them, which is no dict."""
    given = UserDict(token_type_ids=torch.zeros_like(IDS), input_ids=IDS)
    e = lrpfx.explain(Typed(), given, 1)
    values = [[value for _, value in line] for line in e.show_tokens(VOCABULARY).sentences]
    torch.testing.assert_close(torch.tensor(values), e.relevance["input_ids"])
    unknown = SimpleNamespace(model_input_names=["words"])
    with pytest.raises(lrpfx.errors.InputError, match="token_type_ids"):
        e.show_tokens(unknown)  # type: ignore[arg-type]


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


def test_outside_of_a_terminal_there_are_no_colour_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    text = token_text(IDS, RELEVANCE, VOCABULARY)
    assert "\x1b" not in repr(text) and "Ġz(+0)" in repr(text)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[48;2;90;90;255m" in repr(text)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in repr(text)


def test_special_tokens_can_be_left_out() -> None:
    text = token_text(IDS, RELEVANCE, VOCABULARY, skip_special=["<b>"])
    assert [token for token, _ in text.sentences[0]] == VOCABULARY[1:]
    known = Tokenizer()
    known.all_special_tokens = ["Ġz"]  # type: ignore[attr-defined]
    assert token_text(IDS, RELEVANCE, known, skip_special=True).sentences[1] == (("<b>", 0.0),)
    with pytest.raises(lrpfx.errors.InputError, match="all_special_tokens"):
        token_text(IDS, RELEVANCE, VOCABULARY, skip_special=True)


def test_the_scale_can_be_shared_or_a_number() -> None:
    ids, relevance = torch.tensor([[0], [2]]), torch.tensor([[1.0], [-4.0]])
    shades = lambda scale: [  # noqa: E731
        line[0][1] for line in token_text(ids, relevance, VOCABULARY, scale=scale)._shades()
    ]
    assert shades("each") == [1, -1] and shades("shared") == [0.25, -1] and shades(2.0) == [0.5, -1]


def test_sentences_are_labelled_by_what_was_explained() -> None:
    e = lrpfx.explain(Bag(), IDS, 1)
    shown = e.show_tokens(VOCABULARY)
    assert shown.labels == tuple(f"class 1: {value:.3g}" for value in e.output[:, 1].tolist())
    assert (
        repr(shown).startswith(shown.labels[0]) and f"<b>{shown.labels[1]}" in shown._repr_html_()
    )
    with pytest.raises(lrpfx.errors.InputError, match="one per sentence"):
        e.show_tokens(VOCABULARY, labels=["one"])


def test_a_page_of_tokens_is_written(tmp_path: Path) -> None:
    page = token_text(IDS, RELEVANCE, VOCABULARY).to_html(tmp_path / "tokens.html")
    assert (tmp_path / "tokens.html").read_text(encoding="utf-8") == page
    assert "&lt;b&gt;" in page and page.count("<span") == 6


def test_few_of_many_sentences_are_shown_and_all_are_printed() -> None:
    text = token_text(IDS.repeat(20, 1), RELEVANCE.repeat(20, 1), VOCABULARY)
    assert "and 24 more" in repr(text) and len(str(text).splitlines()) == 40
    assert "and 24 more" in text._repr_html_() and text.to_html().count("<p>") == 41


def test_a_picture_of_tokens_wraps_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    text = token_text(IDS.repeat(3, 20), RELEVANCE.repeat(3, 20), VOCABULARY, labels=list("abcdef"))
    figure = text.plot(tmp_path / "tokens.pdf", width=4, limit=2)
    words = [t for t in figure.texts if t.get_text() == "<b>"]
    assert len(words) == 40 and len({t.get_position()[1] for t in words}) > 4
    assert all(0 <= t.get_position()[0] < 1 for t in figure.texts)
    assert "first 2 of 6 sentences" in {t.get_text() for t in figure.texts}
    boxes = [box.get_facecolor()[:3] for box in figure.artists]
    assert len(boxes) == 120
    assert boxes[0][0] == 1 > boxes[0][1] and boxes[1][2] == 1 > boxes[1][0]  # red, blue
    assert b"/Type3" not in (tmp_path / "tokens.pdf").read_bytes()
    with pytest.raises(lrpfx.errors.InputError, match="width"):
        text.plot(width=0)
