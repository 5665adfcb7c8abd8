"""Relevance -> a ``shap.Explanation``, which the plots of SHAP draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lrpfx.errors import InputError
from lrpfx.heatmap import explained_pairs
from lrpfx.text import TokenizerLike, token_text

#: How tokenizers write a space before a word; and others that a token goes on with a word.
_SPACES, _WITHIN = ("\u2581", "\u0120"), "##"


def as_shap(
    relevance: Any,
    inputs: Any,
    absorbed: Tensor,
    target: Tensor | None,
    feature_names: Sequence[str] | None = None,
    tokenizer: TokenizerLike | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
) -> Any:
    """Values and base values of SHAP: their sum is what was explained.

    Args:
        relevance: Structured like the inputs; with a dimension of targets before it if there are
            several.
        inputs: What was explained.
        absorbed: What reached no input, (N,) or (K, N).
        target: The classes, if they are known.
        feature_names: Of tables.
        tokenizer: Gives the tokens of ids, see ``Explanation.show_tokens``; where words begin
            they get a space.
        class_names: Of the outputs.

    Raises:
        InputError: Not exactly one input is explained, or a class has no name.
        ImportError: SHAP is not installed.
    """
    try:
        from shap import Explanation
    except ImportError as error:
        raise ImportError("to_shap() needs SHAP: pip install 'lrpfx[shap]'.") from error
    pairs = explained_pairs(relevance, inputs)
    if len(pairs) != 1:
        raise InputError(
            f"to_shap() is of one explained input, and this explanation has {len(pairs)}.",
            where=[f"{name}: {tuple(x.shape)}" for name, _, x in pairs],
            fix="explain one of them: wrt=.",
        )
    ((_, values, data),) = pairs
    values = values.detach().cpu().double()
    data = data.detach().cpu()
    data = data.double() if data.is_floating_point() else data
    several = values.ndim > data.ndim
    base = absorbed.detach().cpu()
    if base.ndim < 1 + several:
        raise InputError(
            "to_shap() needs what was absorbed for each sample, and the samples share an input.",
            fix="explain inputs whose first dimension is that of the samples.",
        )
    if data.ndim == 4:  # channels last
        values = values.movedim(-3, -1)
        data = data.movedim(-3, -1)
    if several:
        values, base = values.movedim(0, -1), base.movedim(0, -1)
    return Explanation(
        values=values.numpy(),
        base_values=base.double().numpy(),
        data=_tokens(data, tokenizer) if tokenizer is not None else data.numpy(),
        feature_names=None if feature_names is None else list(feature_names),
        # Of one target, plots of images take no name, and those of rows and texts a string.
        output_names=_names(target, values.shape[-1] if several else None, class_names)
        if several or data.ndim == 2
        else None,
    )


def _tokens(ids: Tensor, tokenizer: TokenizerLike) -> Any:
    """The text of each id, as an array of objects."""
    if ids.is_floating_point():
        raise InputError("the explained input holds no token ids.", fix="leave tokenizer=None.")
    sentences = token_text(ids, ids, tokenizer).sentences
    tokens = [[token for token, _ in one] for one in sentences]
    spaced = any(t[:1] in _SPACES or t != t.strip() for one in tokens for t in one)
    return np.array([_texts(one, spaced) for one in tokens], dtype=object)


def _texts(tokens: Sequence[str], spaced: bool) -> list[str]:
    """Tokens as plots set them beside each other.

    Args:
        tokens: Of a sentence.
        spaced: Whether they have the spaces between words themselves.
    """
    if spaced:
        return [" " + t[1:] if t[:1] in _SPACES else t for t in tokens]
    return [
        token.removeprefix(_WITHIN) if token.startswith(_WITHIN) or k == 0 else f" {token}"
        for k, token in enumerate(tokens)
    ]


def _names(
    target: Tensor | None, number: int | None, names: Sequence[str] | Mapping[int, str] | None
) -> list[str] | str | None:
    """Of each target its class, if that is the same for all samples.

    Args:
        target: The classes, (N,) or (K, N), if they are known.
        number: How many targets there are, None for one that is no dimension.
        names: Of the classes.
    """
    if number is None:
        if target is None or target.ndim != 1 or len({*target.tolist()}) != 1:
            return None
        return _name(int(target[0]), names)
    if target is None or target.ndim != 2 or not bool((target == target[:, :1]).all()):
        return [f"target {k}" for k in range(number)]
    return [_name(int(row[0]), names) for row in target]


def _name(index: int, names: Sequence[str] | Mapping[int, str] | None) -> str:
    if names is None:
        return f"class {index}"
    try:
        return str(names[index])
    except LookupError as error:
        raise InputError(
            f"class_names has no name of class {index}.", fix="give one for each output."
        ) from error
