"""A concept table -> one HTML page that needs nothing but itself."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from lrpfx.concepts.accumulate import By
from lrpfx.concepts.views import Reference, View, Viewer

#: Bytes that all pictures of a page take at most, as text.
_PICTURES = 24_000_000
#: How many concepts or classes are linked.
_LINKS = 5

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --pale: #666; --line: #ddd; --page: #fff;
  --card: #f7f7f5; --link: #1a5a96; --mark: #b2182b; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --pale: #9a9a9a; --line: #3a3a3a;
  --page: #161616; --card: #202020; --link: #8ab8e6; --mark: #f4a582; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; max-width: 1500px; padding: 0 1rem 4rem; }
a { color: var(--link); } a:focus-visible, article:focus-visible, input:focus-visible,
  summary:focus-visible { outline: 3px solid var(--mark); outline-offset: 1px; }
.skip { position: absolute; left: -99rem; } .skip:focus { left: 1rem; }
nav { position: sticky; top: 0; z-index: 1; background: var(--page); padding: .5rem 0;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .3rem 1rem;
  align-items: center; }
nav input { font: inherit; color: inherit; background: var(--card); padding: .15rem .5rem;
  border: 1px solid var(--line); border-radius: .3rem; min-width: 0; width: 14rem;
  max-width: 100%; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: 0; }
dt, small, .pale { color: var(--pale); } dd { margin: 0; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%,
  34rem), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .6rem .7rem; content-visibility: auto; contain-intrinsic-size: auto 15rem;
  scroll-margin-top: 4rem; }
article:target { border-color: var(--mark); }
.refs { display: flex; flex-wrap: wrap; gap: .35rem; margin: .3rem 0 0; padding: 0;
  list-style: none; }
.refs li { font-size: .72rem; line-height: 1.25; width: max(64px, calc(var(--t) * 1px)); }
.refs li span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.refs i { display: block; width: calc(var(--t) * 1px); height: calc(var(--t) * 2px);
  background: var(--s) calc(var(--i) * var(--t) * -1px) 0; image-rendering: auto; }
p { margin: .3rem 0 0; overflow-wrap: anywhere; } p a { margin-right: .7rem; }
[hidden] { display: none !important; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .3rem; }
  nav { position: static; } }
"""

_SCRIPT = """
const cards = [...document.querySelectorAll('article')], find = document.querySelector('#find');
const shown = () => cards.filter(card => !card.hidden);
const told = document.querySelector('#told');
find.addEventListener('input', () => {
  const words = find.value.trim().toLowerCase();
  for (const card of cards) card.hidden = !card.textContent.toLowerCase().includes(words);
  told.textContent = words ? shown().length + ' shown' : '';
});
addEventListener('hashchange', () => {
  const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!card) return;
  card.hidden = false; card.scrollIntoView(); card.focus({preventScroll: true});
});
addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'Escape') {
    find.value = ''; find.dispatchEvent(new Event('input')); find.blur();
  }
  if (event.target === find) return;
  if (event.key === '/') { find.focus(); event.preventDefault(); }
  const step = {j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return;
  const all = shown(), at = all.indexOf(document.activeElement.closest('article'));
  const next = all[at < 0 ? (step > 0 ? 0 : all.length - 1) : at + step];
  if (next) { next.focus(); next.scrollIntoView({block: 'nearest'}); event.preventDefault(); }
});
"""

#: Nothing is loaded from anywhere, whatever a name tries.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Scanned(Protocol):
    """What a page asks of a ``ConceptTable``."""

    facts: dict[str, Any]
    layers: tuple[str, ...]

    @property
    def targets(self) -> list[int]:
        """The classes that there are."""

    def references(
        self, layer: str, concept: int, *, k: int, by: By, target: int | None
    ) -> list[Reference]:
        """The samples that show a concept."""

    def top(self, layer: str, *, target: int, k: int) -> list[tuple[int, float]]:
        """The concepts of a class."""

    def classes(self, layer: str, concept: int) -> list[tuple[int, float]]:
        """The classes of a concept."""


class Page:
    """The page of a scan.

    Args:
        table: The scan.
        viewer: Makes the pictures.
        concepts: By layer, those that are shown.
        k: How many references of each.
        by: What they are ranked by.
        target: Of this class only; None for all.
        names: Of classes, and of samples.
    """

    def __init__(
        self,
        table: Scanned,
        viewer: Viewer,
        concepts: Mapping[str, Sequence[int]],
        k: int,
        by: By,
        target: int | None,
        names: tuple[Mapping[int, str], Mapping[int, str]],
    ) -> None:
        self.table, self.viewer, self.concepts, self.k, self.by = table, viewer, concepts, k, by
        self.target = target
        self.classes, self.samples = names
        count = max(1, sum(map(len, concepts.values())))
        self._most = _PICTURES * 3 // 4 // count
        self._tile = 96 if count <= 100 else 64
        self._shown = {(layer, c) for layer, some in concepts.items() for c in some}

    def lines(self) -> Iterator[str]:
        """The page, piece by piece; one for each concept among them."""
        facts = self.table.facts
        title = f"Concepts of {facts['model']}"
        yield (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            '<a class="skip" href="#concepts">Skip to the concepts</a>\n'
            f"<h1>{_text(title)}</h1>\n{self._facts()}\n{self._navigation()}<main>\n"
        )
        yield from self._of_classes()
        yield '<div id="concepts">\n'
        for layer in self.concepts:
            yield from self._of_layer(layer)
        yield f"</div>\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"

    def _facts(self) -> str:
        facts = self.table.facts
        crop = {None: "whole samples", "field": "receptive fields", "relevance": "by relevance"}
        only = "" if self.target is None else f" among {self._name(self.target)}"
        told = {
            "samples": facts["samples"],
            "rules": facts["rules"],
            "explained": facts["target"],
            "references": f"by {self.by}, the best {self.k} of each concept{only}; a sample, and "
            f"below it what the concept saw for the explained class ({crop[self.viewer.crop]}): "
            "red speaks for the class, blue against it",
            "layers": ", ".join(self.concepts),
        }
        return (
            "<dl>"
            + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in told.items())
            + "</dl>"
        )

    def _navigation(self) -> str:
        layers = "".join(
            f'<a href="#{_layer_id(self.table, layer)}">layer {_text(layer)}</a>'
            for layer in self.concepts
        )
        return (
            '<nav><label>Find <input id="find" type="search" placeholder="layer, class, sample">'
            f'</label><a href="#classes">classes</a>{layers}'
            "<small>keys: / finds, arrows or j and k go from card to card</small>"
            '<small id="told" role="status"></small></nav>\n'
        )

    def _of_classes(self) -> Iterator[str]:
        yield '<section id="classes"><h2>Classes</h2><div class="cards">\n'
        for label in self.table.targets:
            rows = []
            for layer in self.concepts:
                best = self.table.top(layer, target=label, k=_LINKS)
                links = "".join(self._concept_link(layer, c, score) for c, score in best)
                rows.append(f"<p><small>layer {_text(layer)}:</small> {links}</p>")
            yield (
                f'<article id="{_class_id(label)}" tabindex="0"><h3>{_text(self._name(label))}'
                f"</h3>{''.join(rows)}</article>\n"
            )
        yield "</div></section>\n"

    def _of_layer(self, layer: str) -> Iterator[str]:
        yield (
            f'<section id="{_layer_id(self.table, layer)}"><h2>Layer {_text(layer)}</h2>'
            '<div class="cards">\n'
        )
        concepts = self.concepts[layer]
        found = {
            c: self.table.references(layer, c, k=self.k, by=self.by, target=self.target)
            for c in concepts
        }
        views = self.viewer.views(layer, [(c, r) for c in concepts for r in found[c]])
        for concept in concepts:
            yield self._card(layer, concept, list(itertools.islice(views, len(found[concept]))))
        yield "</div></section>\n"

    def _card(self, layer: str, concept: int, views: Sequence[View]) -> str:
        strip = _strip(views, self._tile, self._most)
        style = f' style="--t:{strip[1]};--s:url({strip[0]})"' if strip else ""
        cells = "".join(self._reference(i, view, strip is not None) for i, view in enumerate(views))
        links = "".join(
            f'<a href="#{_class_id(label)}">{_text(self._name(label))} '
            f"<small>{score:.3g}</small></a>"
            for label, score in self.table.classes(layer, concept)[:_LINKS]
        )
        return (
            f'<article id="{_concept_id(self.table, layer, concept)}" tabindex="0">'
            f"<h3>{_text(layer)}: concept {concept}</h3>"
            f'<ul class="refs"{style}>{cells}</ul><p>{links}</p></article>\n'
        )

    def _reference(self, i: int, view: View, drawn: bool) -> str:
        told = view.reference
        name = self.samples.get(told.sample, f"sample {told.sample}")
        label = "" if told.label < 0 else self._name(told.label)
        words = ", ".join(filter(None, [name, label, f"score {told.score:.3g}"]))
        picture = f'<i role="img" aria-label="{_text(words)}" style="--i:{i}"></i>' if drawn else ""
        return (
            f'<li title="{_text(words)}">{picture}<span>{_text(name)}</span>'
            f"<span>{_text(label)}</span><span>{told.score:.3g}</span></li>"
        )

    def _concept_link(self, layer: str, concept: int, score: float) -> str:
        text = f"{concept} <small>{score:.3g}</small>"
        if (layer, concept) not in self._shown:
            return f'<span class="pale">{text}</span> '
        return f'<a href="#{_concept_id(self.table, layer, concept)}">{text}</a>'

    def _name(self, label: int) -> str:
        return self.classes.get(label, f"class {label}")


def _concept_id(table: Scanned, layer: str, concept: int) -> str:
    return f"c{table.layers.index(layer)}-{concept}"


def _layer_id(table: Scanned, layer: str) -> str:
    return f"l{table.layers.index(layer)}"


def _class_id(label: int) -> str:
    return f"k{label}"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _strip(views: Sequence[View], tile: int, most: int) -> tuple[str, int] | None:
    """Samples side by side, their maps below, as a data URL; and a tile's side."""
    from lrpfx.draw import draw_strip

    images = [view.image for view in views if view.image is not None]
    maps = [view.relevance for view in views if view.relevance is not None]
    return draw_strip([images, maps], tile, most) if len(images) == len(views) > 0 else None
