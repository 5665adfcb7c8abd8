"""Token relevance as text on a red and blue scale: HTML in a notebook, colours in a terminal."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from lrpfx.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TokenText", "Tokenizer", "TokenizerLike", "token_text"]

_MOST = 16  # sentences that are shown without being asked for


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of ``transformers`` have it."""

    def convert_ids_to_tokens(self, ids: Any) -> list[str]:
        """The tokens of a list of ids."""


TokenizerLike = Tokenizer | Callable[[int], str] | Sequence[str]


@dataclass(frozen=True)
class TokenText:
    """Sentences of (token, relevance); red speaks for the target, blue against it.

    A notebook shows it in colour, and so does a terminal; elsewhere each token is followed by its
    relevance in brackets. Without being asked for, 16 sentences are shown.

    Args:
        sentences: Per sentence, its tokens with their relevance.
        labels: One per sentence, before it; none by default.
        scale: What has full colour: the largest absolute relevance of "each" sentence, the largest
            of all ("shared"), or a number.
    """

    sentences: tuple[tuple[tuple[str, float], ...], ...]
    labels: tuple[str, ...] = ()
    scale: Literal["each", "shared"] | float = "each"

    def _shades(self) -> list[list[tuple[str, float]]]:
        """Per sentence, tokens with their relevance in [-1, 1]."""
        sizes = [max((abs(value) for _, value in line), default=0.0) for line in self.sentences]
        if self.scale == "shared":
            sizes = [max(sizes, default=0.0)] * len(sizes)
        elif not isinstance(self.scale, str):
            sizes = [float(self.scale)] * len(sizes)
        return [
            [(token, max(-1.0, min(1.0, value / (size or 1.0)))) for token, value in line]
            for line, size in zip(self.sentences, sizes, strict=True)
        ]

    def __str__(self) -> str:
        return self._text(len(self.sentences))

    def __repr__(self) -> str:
        return self._text(_MOST)

    def _text(self, most: int) -> str:
        colour = _takes_colour()

        def painted(token: str, value: float, shade: float) -> str:
            if not colour:
                return f"{_visible(token)}({value:+.2g})"
            red, green, blue = _colour(shade)
            return f"\x1b[48;2;{red};{green};{blue}m\x1b[30m{_visible(token)}\x1b[0m"

        lines = []
        shaded = self._shades()
        for i, sentence in enumerate(self.sentences[:most]):
            words = " ".join(
                painted(token, value, shade)
                for (token, value), (_, shade) in zip(sentence, shaded[i], strict=True)
            )
            lines.append(f"{_visible(self.labels[i])}  {words}" if self.labels else words)
        more = len(self.sentences) - most
        if more > 0:
            lines.append(f"... and {more} more sentences: print() shows all, to_html(path) too")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        more = len(self.sentences) - _MOST
        rest = f"<p>... and {more} more sentences: to_html(path) writes all.</p>"
        return self._lines(_MOST) + (rest if more > 0 else "")

    def _lines(self, most: int) -> str:
        lines = []
        shaded = self._shades()
        for i, sentence in enumerate(self.sentences[:most]):
            spans = []
            for (token, value), (_, shade) in zip(sentence, shaded[i], strict=True):
                red, green, blue = _colour(shade)
                spans.append(
                    f'<span style="background:rgb({red},{green},{blue});color:black" '
                    f'title="{value:.3g}">{html.escape(_visible(token))}</span>'
                )
            label = f"<b>{html.escape(self.labels[i])}</b> " if self.labels else ""
            lines.append(f"<p>{label}{' '.join(spans)}</p>")
        return "".join(lines)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        width: float = 7.0,
        limit: int = _MOST,
    ) -> Figure:
        """Draw the sentences as a picture, as papers want it.

        Args:
            path: Where to write it, if anywhere; the ending names the format (png, pdf, svg).
            width: Inches that lines are wrapped at.
            limit: How many sentences at most. The picture says how many it leaves out.

        Returns:
            The figure; a notebook shows it.

        Raises:
            InputError: An option does not fit, or the picture cannot be written.
        """
        from lrpfx.draw import draw_tokens, positive, written

        if not width > 1:
            raise InputError(f"width={width!r}.", fix="give inches, more than 1.")
        most = positive("limit", limit) or _MOST
        lines = [
            [(_visible(token), _colour(shade)) for token, shade in line]
            for line in self._shades()[:most]
        ]
        more = len(self.sentences) - most
        note = f"first {most} of {len(self.sentences)} sentences" if more > 0 else ""
        labels = [_visible(label) for label in self.labels]
        return written(draw_tokens(lines, labels, width, note), path)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One page with every sentence, without scripts or other files.

        Args:
            path: Where to write it, if anywhere.

        Returns:
            The page.
        """
        page = (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            "<title>Relevance of tokens</title>\n<style>body { font: 16px/1.6 system-ui, "
            "sans-serif; margin: 2em; max-width: 60em; } span { padding: .1em; }</style>\n"
            "</head>\n<body>\n<p>Red speaks for the target, blue against it; the number of a token "
            "shows under the pointer.</p>\n"
            f"{self._lines(len(self.sentences))}\n</body>\n</html>\n"
        )
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(page)
        return page


def token_text(
    ids: Tensor,
    relevance: Tensor,
    tokenizer: TokenizerLike,
    *,
    skip_special: bool | Collection[str] = False,
    labels: Sequence[str] | None = None,
    scale: Literal["each", "shared"] | float = "each",
) -> TokenText:
    """Pair every token with its relevance.

    Args:
        ids: Token ids, (N, T).
        relevance: Relevance of each token, (N, T).
        tokenizer: Something with ``convert_ids_to_tokens``, a function from an id to its token, or
            a vocabulary indexed by id.
        skip_special: Leave out the tokenizer's special tokens ([CLS], [PAD], <s> ...), or those
            named here. They often take most of the relevance, and with it all of the colour.
        labels: One per sentence.
        scale: What has full colour: the largest absolute relevance of "each" sentence, the largest
            of all ("shared"), or a number.

    Raises:
        InputError: The tokenizer has no token for an id, or an option does not fit.
    """
    if labels is not None and len(labels) != len(ids):
        raise InputError(
            f"labels has {len(labels)} entries, and there are {len(ids)} sentences.",
            fix="give one per sentence.",
        )
    if (scale not in ("each", "shared")) if isinstance(scale, str) else not scale > 0:
        raise InputError(f"scale={scale!r}.", fix="give 'each', 'shared' or a positive number.")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a pipeline
    skipped = _skipped(tokenizer, skip_special)
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
        pairs = zip(map(str, tokens), values, strict=True)
        sentences.append(tuple(pair for pair in pairs if pair[0] not in skipped))
    return TokenText(tuple(sentences), tuple(labels or ()), scale)


def _skipped(tokenizer: Any, skip: bool | Collection[str]) -> Collection[str]:
    if not isinstance(skip, bool):
        return {skip} if isinstance(skip, str) else set(skip)
    if not skip:
        return ()
    special = getattr(tokenizer, "all_special_tokens", None)
    if special is None:
        raise InputError(
            f"skip_special=True asks the tokenizer for its special tokens, and this "
            f"{type(tokenizer).__name__} has no all_special_tokens.",
            fix='name them: skip_special=["[CLS]", "[SEP]", "[PAD]"].',
        )
    return {str(token) for token in special}


def _takes_colour() -> bool:
    """Whether what is printed goes to a terminal that shows colours."""
    if "NO_COLOR" in os.environ:
        return False
    return "FORCE_COLOR" in os.environ or bool(getattr(sys.stdout, "isatty", bool)())


def _colour(shade: float) -> tuple[int, int, int]:
    """White at 0, red at 1, blue at -1, light enough for black text."""
    rest = round(255 - 165 * min(abs(shade), 1.0))
    return (255, rest, rest) if shade >= 0 else (rest, rest, 255)


def _visible(token: str) -> str:
    """A token without control characters, which would act on a terminal instead of showing."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)
