"""What a notebook shows of an explanation: a picture or coloured tokens, a line of facts, a report.

The functions take the parts of an explanation, which knows how to show itself by them.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.capture import tensors_of
from lrpfx.errors import LrpError
from lrpfx.heatmap import Kind, explained_pairs, heatmap
from lrpfx.report import Report, Row
from lrpfx.text import token_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def titles(target: Tensor | None, seed: Any, n: int) -> list[str] | None:
    """What was explained of each of n samples, and its value; None where that is not per sample."""
    seeds = [one.detach() for one in pytree.tree_leaves(seed)]
    if any(one.ndim == 0 or len(one) != n for one in seeds):
        return None
    sums = torch.stack([one.reshape(n, -1).sum(1) for one in seeds]).sum(0).tolist()
    if target is None or target.shape != (n,) or seeds[0].shape[-1] == 1:
        return [f"output {value:.3g}" for value in sums]
    return [f"class {c}: {v:.3g}" for c, v in zip(target.tolist(), sums, strict=True)]


def layout(rows: Sequence[Row], relevance: Tensor) -> Kind | None:
    """Which dimension of an input (N, ., .) is time, as its first layer takes it.

    A convolution over time has it last, a linear layer (of a recurrent or attention layer, too) has
    features there. Transpositions before it are followed by the last size; None if that does not
    tell.
    """
    if relevance.ndim != 3:
        return None
    last: int | str = relevance.shape[2]
    for row in rows:
        if row.op in ("transpose", "permute"):
            if relevance.shape[1] == relevance.shape[2]:
                return None
            last = row.shape[-1]
        elif row.op == "conv1d":
            return "signal" if last == relevance.shape[2] else "sequence"
        elif row.op == "linear":
            return "sequence" if last == relevance.shape[2] else None
        elif row.op in ("conv2d", "conv3d"):
            return None
    return None


def page(
    relevance: Any, inputs: Any, report: Report, named: Sequence[str] | None, several: bool
) -> str:
    """The parts of an explanation as HTML; whatever cannot be drawn is left out.

    Args:
        relevance: Of the explanation.
        inputs: Likewise.
        report: Likewise.
        named: A title per sample.
        several: Whether it is of several targets, which are not drawn.
    """
    pairs = [] if several else explained_pairs(relevance, inputs)
    shown = []
    for name, r, x in pairs:
        above = f"<p><code>{html.escape(name)}</code></p>" if len(pairs) > 1 else ""
        shown.append(above + _shown(r, x, report, named))
    noted = "".join(f"<p><small>note: {html.escape(note)}</small></p>" for note in report.notes)
    return f"{''.join(shown)}<p>{facts(relevance, report)}</p>{noted}{_folded(report)}"


def facts(relevance: Any, report: Report) -> str:
    """One line: what was explained by which rules, and how much of it reached the inputs."""
    tensors = tensors_of(relevance)
    shapes = ", ".join(f"{str(r.dtype).removeprefix('torch.')}{list(r.shape)}" for r in tensors)
    balance = ""
    if report.started is not None and report.reached is not None:
        lost = report.started - report.reached
        balance = (
            f" &middot; sums to {report.reached:.4g} of {report.started:.4g} explained, "
            f"{lost:.3g} was absorbed"
        )
    rules = html.escape(report.rules)
    return f"<b>{rules}</b> &middot; {html.escape(report.target)} &middot; {shapes}{balance}"


def _shown(r: Tensor, x: Tensor, report: Report, named: Sequence[str] | None) -> str:
    """A picture of one explained input, or its tokens; in words why there is none."""
    if not x.is_floating_point():
        if x.ndim != 2:
            return ""
        labels = named if named is not None and len(named) == len(x) else None
        text = token_text(x, r, str, labels=labels)._repr_html_()
        return f"{text}<p><small>token ids; show_tokens(tokenizer) shows the words</small></p>"
    titled = named if named is not None and len(named) == len(r) else None
    try:
        picture = heatmap(r, inputs=x, titles=titled, kind=layout(report.planned().rows, r))
    except LrpError as error:
        why = f"no picture: {error.what} {error.fix}".replace("give ", "plot() takes ", 1)
        return f"<p><small>{html.escape(why)}</small></p>"
    return _image(picture)


def _image(picture: Figure) -> str:
    import io

    file = io.BytesIO()
    picture.savefig(file, format="png", dpi=100)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" style="max-width:100%">'


def _folded(report: Report) -> str:
    """The table of the report; without sums that are yet to be computed: showing costs nothing."""
    said = "report: the rule of each op, and what was absorbed where"
    if report.pending:
        report, said = report.planned(), "report: the rule of each op; sums are added on demand"
    table = report._repr_html_()
    return f"<details><summary>{said}</summary>{table}</details>"
