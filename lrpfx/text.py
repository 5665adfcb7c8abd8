"""Token relevance as text on a red and blue scale: HTML in a notebook, colours in a terminal."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lrpfx.errors import InputError


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of ``transformers`` have it."""

    def convert_ids_to_tokens(self, ids: Any) -> list[str]:
        """The tokens of a list of ids."""


@dataclass(frozen=True)
class TokenText:
    """Sentences of (token, relevance); red speaks for the target, blue against it.

    The scale is symmetric and, per sentence, reaches to the largest absolute relevance.
    """

    sentences: tuple[tuple[tuple[str, float], ...], ...]

    def _shades(self) -> list[list[tuple[str, float]]]:
        """Per sentence, tokens with their relevance in [-1, 1]."""
        shaded = []
        for sentence in self.sentences:
            most = max((abs(value) for _, value in sentence), default=0.0) or 1.0
            shaded.append([(token, value / most) for token, value in sentence])
        return shaded

    def __repr__(self) -> str:
        def painted(token: str, shade: float) -> str:
            red, green, blue = _colour(shade)
            return f"\x1b[48;2;{red};{green};{blue}m\x1b[30m{_visible(token)}\x1b[0m"

        return "\n".join(" ".join(painted(*pair) for pair in line) for line in self._shades())

    def _repr_html_(self) -> str:
        lines = []
        for sentence, shades in zip(self.sentences, self._shades(), strict=True):
            spans = []
            for (token, value), (_, shade) in zip(sentence, shades, strict=True):
                red, green, blue = _colour(shade)
                spans.append(
                    f'<span style="background:rgb({red},{green},{blue});color:black" '
                    f'title="{value:.3g}">{html.escape(_visible(token))}</span>'
                )
            lines.append(f"<p>{' '.join(spans)}</p>")
        return "".join(lines)


def token_text(
    ids: Tensor, relevance: Tensor, tokenizer: Tokenizer | Callable[[int], str] | Sequence[str]
) -> TokenText:
    """Pair every token with its relevance.

    Args:
        ids: Token ids, (N, T).
        relevance: Relevance of each token, (N, T).
        tokenizer: Something with ``convert_ids_to_tokens``, a function from an id to its token, or
            a vocabulary indexed by id.

    Raises:
        InputError: The tokenizer has no token for an id.
    """
    sentences = []
    for row, values in zip(ids.tolist(), relevance.detach().double().tolist(), strict=True):
        try:
            if hasattr(tokenizer, "convert_ids_to_tokens"):
                tokens = tokenizer.convert_ids_to_tokens(row)
            else:
                known = tokenizer if callable(tokenizer) else tokenizer.__getitem__
                tokens = [known(i) for i in row]
        except (LookupError, TypeError) as error:
            raise InputError(
                f"the tokenizer has no token for one of the ids {min(row)} to {max(row)}: "
                f"{type(error).__name__}: {error}",
                fix="give the tokenizer, or the vocabulary, that the ids were made with.",
            ) from error
        sentences.append(tuple(zip(map(str, tokens), values, strict=True)))
    return TokenText(tuple(sentences))


def _colour(shade: float) -> tuple[int, int, int]:
    """White at 0, red at 1, blue at -1, light enough for black text."""
    rest = round(255 - 165 * min(abs(shade), 1.0))
    return (255, rest, rest) if shade >= 0 else (rest, rest, 255)


def _visible(token: str) -> str:
    """A token without control characters, which would act on a terminal instead of showing."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)
