"""Strategies -> one HTML page that needs nothing but itself."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lrpfx.errors import InputError
from lrpfx.spray.strategy import Strategy

#: Of clusters, told apart in light and dark, in the order of their sizes.
_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f", "#76b7b2", "#edc948")
_NOISE = "#888888"
_TILE = 96

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --pale: #666; --line: #ddd; --page: #fff;
  --card: #f7f7f5; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --pale: #9a9a9a; --line: #3a3a3a;
  --page: #161616; --card: #202020; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; max-width: 70rem; padding: 0 1rem 3rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 0 0 .4rem; }
a { color: inherit; } a:focus-visible, section:focus-visible { outline: 3px solid #b2182b; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: right; }
th { color: var(--pale); font-weight: normal; }
b { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin-right: .4rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .6rem .7rem; margin-top: .8rem; }
svg { width: 100%; max-width: 34rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .4rem; margin-top: .8rem; }
ul { display: flex; flex-wrap: wrap; gap: .35rem; list-style: none; margin: 0; padding: 0; }
li { font-size: .72rem; width: calc(var(--t) * 1px); }
li span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
i { display: block; width: calc(var(--t) * 1px); height: calc(var(--t) * var(--r) * 1px);
  background: var(--s) calc(var(--i) * var(--t) * -1px) 0; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(
    clusters: Sequence[Strategy],
    path: str | os.PathLike[str],
    maps: Tensor | ArrayLike | None,
    images: Tensor | ArrayLike | None,
    placed: ArrayLike | None,
    names: Sequence[str] | None,
    title: str,
    k: int,
) -> None:
    """Write the page; the arguments are those of ``Strategies.to_html``."""
    size = sum(len(cluster.samples) for cluster in clusters)
    shown = _Shown(_read("maps", maps, size), _read("images", images, size), names, k)
    if shown.maps is not None and shown.maps.ndim == 4:
        shown.maps = shown.maps.sum(1)
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n"
    )
    plane = "" if placed is None else _plane(clusters, np.asarray(placed, dtype=np.float64))
    cards = "".join(map(shown.card, clusters))
    text = f"{head}{_table(clusters)}{plane}{cards}</body>\n</html>\n"
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(
            f"{os.fspath(path)} cannot be written: {error}", fix="give a folder that exists."
        ) from error


class _Shown:
    """What is shown of each cluster."""

    def __init__(
        self,
        maps: NDArray[Any] | None,
        images: NDArray[Any] | None,
        names: Sequence[str] | None,
        k: int,
    ) -> None:
        self.maps, self.images, self.names, self.k = maps, images, names, k

    def card(self, cluster: Strategy) -> str:
        """Its mean map, and the samples nearest to it."""
        from lrpfx.draw import draw_strip

        samples = self._nearest(cluster)
        rows, columns = [], [f"mean of {len(cluster.samples)}"]
        mean = cluster.mean if cluster.mean.ndim == 2 else None
        blank = np.zeros((1, 1))
        if self.images is not None:
            rows.append([np.ones((1, 1, 3)), *(_image(self.images[i]) for i in samples)])
        if self.maps is not None or mean is not None:
            some = [] if self.maps is None else [self.maps[i] for i in samples]
            rows.append([blank if mean is None else mean, *some])
        if self.images is not None or self.maps is not None:
            columns += [str(i) if self.names is None else self.names[i] for i in samples]
        rows = [row + [blank] * (len(columns) - len(row)) for row in rows]
        cells, style = "", ""
        if rows:
            url, side = draw_strip(rows, _TILE, 2**20)
            style = f' style="--t:{side};--r:{len(rows)};--s:url({url})"'
        for i, name in enumerate(map(html.escape, columns)):
            picture = f'<i role="img" aria-label="{name}" style="--i:{i}"></i>' if rows else ""
            cells += f'<li title="{name}">{picture}<span>{name}</span></li>'
        return (
            f'<section id="s{cluster.cluster}" tabindex="0"><h2>{_dot(cluster)}{_name(cluster)}'
            f"</h2><ul{style}>{cells}</ul></section>\n"
        )

    def _nearest(self, cluster: Strategy) -> list[int]:
        """Samples by how far their maps are from the cluster's mean."""
        if self.maps is None:
            return list(cluster.samples)[: self.k]
        own = self.maps[list(cluster.samples)].reshape(len(cluster.samples), -1)
        scaled = own / np.maximum(np.abs(own).sum(1, keepdims=True), 1e-300)
        far = np.linalg.norm(scaled - scaled.mean(0), axis=1)
        return [cluster.samples[i] for i in np.argsort(far, kind="stable")[: self.k]]


def _table(clusters: Sequence[Strategy]) -> str:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    rows = "".join(
        f'<tr><td><a href="#s{s.cluster}">{_dot(s)}{_name(s)}</a></td><td>{len(s.samples)}</td>'
        f"<td>{share(s.purity)}</td><td>{share(s.accuracy)}</td></tr>"
        for s in clusters
    )
    return (
        "<table><thead><tr><th>cluster</th><th>size</th><th>purity</th><th>accuracy</th></tr>"
        f"</thead><tbody>{rows}</tbody></table>\n"
    )


def _plane(clusters: Sequence[Strategy], placed: NDArray[np.float64]) -> str:
    """All samples as dots."""
    low, high = placed.min(0), placed.max(0)
    at = (placed - low) / np.where(high > low, high - low, 1) * 96 + 2
    groups = []
    for s in clusters:
        dots = "".join(
            f'<circle cx="{at[i, 0]:.2f}" cy="{100 - at[i, 1]:.2f}" r=".9"><title>{i}</title>'
            "</circle>"
            for i in s.samples
        )
        groups.append(f'<g fill="{_colour(s)}">{dots}</g>')
    return (
        '<svg viewBox="0 0 100 100" role="img" aria-label="All samples in a plane">'
        f"{''.join(groups)}</svg>\n"
    )


def _read(name: str, values: Tensor | ArrayLike | None, size: int) -> NDArray[Any] | None:
    if values is None:
        return None
    found = torch.as_tensor(values).detach().cpu().double().numpy()
    wanted = (4,) if name == "images" else (3, 4)
    if found.ndim not in wanted or len(found) != size:
        raise InputError(
            f"{name} are {found.shape}, and {size} samples were clustered.",
            fix="give (N, C, H, W), one for each sample.",
        )
    return np.asarray(found)


def _image(x: NDArray[Any]) -> NDArray[Any]:
    values = x if len(x) == 3 else np.repeat(x.mean(0, keepdims=True), 3, axis=0)
    low, high = float(values.min()), float(values.max())
    return ((values - low) / ((high - low) or 1.0)).transpose(1, 2, 0)


def _name(cluster: Strategy) -> str:
    return "noise" if cluster.cluster < 0 else f"cluster {cluster.cluster}"


def _dot(cluster: Strategy) -> str:
    return f'<b style="background:{_colour(cluster)}"></b>'


def _colour(cluster: Strategy) -> str:
    return _NOISE if cluster.cluster < 0 else _COLOURS[cluster.cluster % len(_COLOURS)]
