"""Model, data, candidates -> the rules whose explanations are best by a measure."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lrpfx.capture import Wrt
from lrpfx.composites import Composite, Entry, describe
from lrpfx.errors import InputError, LrpError
from lrpfx.evaluate import perturbation
from lrpfx.explain import Explainer
from lrpfx.explanation import Explanation
from lrpfx.plan import RulesLike, read_rules
from lrpfx.probe import Fill
from lrpfx.progress import shown
from lrpfx.report import Column, Table, Tabular
from lrpfx.rules import Epsilon, Gamma, Rule

#: Samples of a data set that are read together.
_BATCH = 32

#: The value of an explanation: one number per sample, or one; more is better.
Objective = Callable[[Explanation], Any]
#: How many combinations of a grid are all tried, if no budget is given.
_ALL = 64


class Trial(NamedTuple):
    """Rules that were tried.

    Args:
        name: What they are called.
        rules: As a composite.
        values: Of the objective, one per sample, (N,).
        seconds: Per batch, set-up left out.
        same: Other candidates that come to the same rules on this model.
    """

    name: str
    rules: Composite
    values: Tensor
    seconds: float
    same: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Over samples."""
        return float(self.values.mean())


@dataclass(frozen=True, repr=False)
class Trials(Tabular, Sequence[Trial]):
    """What was tried, the best first.

    Args:
        trials: Sorted by their means.
        objective: What they were judged by.
        left_out: Candidates that this model cannot be explained with, and why.
    """

    trials: tuple[Trial, ...]
    objective: str
    left_out: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, index: Any) -> Any:
        return self.trials[index]

    def __len__(self) -> int:
        return len(self.trials)

    def table(self) -> Table:
        """A line per candidate: its mean, and by how much it is behind the best."""
        best = self.trials[0]
        columns = (
            Column("rules", 60),
            Column(f"mean {self.objective}", 20, right=True),
            Column("behind the best", 22, right=True),
            Column("ms", 8, right=True),
        )
        cells = []
        for trial in self.trials:
            name = " = ".join([trial.name, *trial.same])
            behind = "" if trial is best else _with_error(best.values - trial.values)
            cells.append([name, _with_error(trial.values), behind, f"{1000 * trial.seconds:.3g}"])
        lines = [
            f"{len(self)} rule sets by {self.objective} on {len(best.values)} samples; "
            "\N{PLUS-MINUS SIGN} is twice the standard error. The best was chosen on these "
            "samples: on others it may be less good."
        ]
        lines += [f"left out {name}: {why}" for name, why in self.left_out]
        return Table(lines, columns, cells, width=120)


class Tuned(NamedTuple):
    """The best rules, and what they were chosen over.

    Args:
        composite: For ``rules=``.
        trials: All that were tried, the best first; printed, it is a table.
    """

    composite: Composite
    trials: Trials

    def __str__(self) -> str:
        return str(self.trials)


def tune(
    model: nn.Module | Explainer,
    data: Any,
    target: Any = None,
    rules: Any = None,
    objective: Literal["abpc", "aopc"] | Objective = "abpc",
    budget: int | None = None,
    *,
    over: RulesLike = None,
    steps: int = 20,
    fill: Fill = "mean",
    patch: int | Sequence[int] = 1,
    kind: Literal["signal", "sequence"] | None = None,
    seed: int = 0,
    wrt: Wrt = None,
    progress: bool = True,
) -> Tuned:
    """Find the rules whose explanations are best by a measure.

    Args:
        model: A module in evaluation mode, or an Explainer, which stands for its model.
        data: Inputs as ``lrpfx.explain`` takes them; or an iterable of such batches that is no
            list or tuple, such as a ``DataLoader``; or a data set, which is read in batches of 32.
        target: As ``lrpfx.explain`` takes it, not several. With an iterable of (inputs, labels)
            also "label".
        rules: The candidates. A list of composites, names and lists of entries; a dict from names
            to these; or a dict from selectors to lists of rules, of which one is chosen for each:
            ``{"conv": [ZPlus(), Gamma(0.1)], "linear": [Epsilon(), Epsilon(0.1)]}``. None for the
            named composites and some of Gamma.
        objective: "abpc" or "aopc" of ``lrpfx.evaluate.perturbation``, or a function of an
            Explanation that returns one number per sample, or one; more is better.
        budget: So many candidates are tried at most, of a list the first. Combinations of rules
            are all tried if there are not more, else one selector after the other.
        over: The composite that combinations stand in front of; None for the default.
        steps: Of ``perturbation``; so are ``fill``, ``patch`` and ``kind``.
        fill: See ``steps``.
        patch: See ``steps``.
        kind: See ``steps``.
        seed: Of the order of equal parts.
        wrt: As ``lrpfx.explain`` takes it.
        progress: Whether a bar is shown (by tqdm, if installed) if it takes long.

    Returns:
        The best composite and all trials: ``composite, trials = lrpfx.tune(...)``.

    Raises:
        InputError: There are no candidates, or the objective returns no number.
        LrpError: As ``lrpfx.explain``; candidates of the default that do not fit are left out.

    Source: Pahde et al. 2023, https://arxiv.org/abs/2211.17174 (rules found by search, judged by
    metrics such as faithfulness).
    """
    if isinstance(model, Explainer):
        wrt = model.wrt if wrt is None else wrt
        model = model.model
    if budget is not None and (not isinstance(budget, int) or budget < 1):
        raise InputError(f"budget={budget!r} is no number of candidates.", fix="give at least 1.")
    batches = _batches(data, target)

    def judge(explanation: Explanation, wanted: Any) -> Any:
        if callable(objective):
            return objective(explanation)
        if objective not in ("abpc", "aopc"):
            raise InputError(
                f"objective={objective!r} is not known.",
                fix='give "abpc", "aopc", or a function of an explanation.',
            )
        curves = perturbation(
            model,
            explanation.inputs,
            explanation,
            wanted,
            steps,
            fill=fill,
            patch=patch,
            kind=kind,
            seed=seed,
            wrt=wrt,
            progress=False,
        )
        return curves.abpc if objective == "abpc" else curves.aopc

    tried: dict[tuple[str, ...], Trial] = {}

    def attempt(name: str, candidate: RulesLike) -> Trial:
        composite = read_rules(candidate)
        explainer = Explainer(model, batches[0][0], composite, wrt=wrt)
        key = tuple(f"{row.node} {row.rule}" for row in explainer.report.rows)
        if key in tried:
            tried[key] = tried[key]._replace(same=(*tried[key].same, name))
            return tried[key]
        values, spent = [], 0.0
        explainer(*batches[0], ledger=False)  # sets up what is not timed
        for inputs, wanted in batches:
            begin = time.perf_counter()
            explanation = explainer(inputs, wanted, ledger=False)
            spent += time.perf_counter() - begin
            values.append(_numbers(judge(explanation, wanted)))
        tried[key] = Trial(name, composite, torch.cat(values), spent / len(batches))
        return tried[key]

    left_out: list[tuple[str, str]] = []
    if _is_grid(rules):
        _search(rules, over, attempt, budget, progress)
    else:
        candidates = _default() if rules is None else _named(rules)
        for name, candidate in shown(candidates[:budget], "rules", progress):
            try:
                attempt(name, candidate)
            except LrpError as error:
                if rules is not None or isinstance(error, InputError):
                    raise
                left_out.append((name, error.what))
    order = sorted(tried.values(), key=lambda trial: -trial.mean)
    if not order:
        raise InputError("there are no rules to choose from.", fix="give candidates: rules=[...].")
    label = objective if isinstance(objective, str) else getattr(objective, "__name__", "objective")
    return Tuned(order[0].rules, Trials(tuple(order), label, tuple(left_out)))


def _default() -> list[tuple[str, RulesLike]]:
    """Candidates for any model."""
    names = (
        "auto epsilon_all epsilon_gamma epsilon_plus epsilon_plus_flat epsilon_alpha2_beta1 "
        "epsilon_alpha2_beta1_flat excitation_backprop attnlrp cplrp"
    ).split()
    gammas: list[tuple[str, RulesLike]] = [
        (f"Gamma({gamma:g}) on convolutions", Composite([("conv", Gamma(gamma))]))
        for gamma in (0.1, 0.25, 1.0)
    ]
    gammas.append(("Gamma(0.25) on all", Composite([(("conv", "linear"), Gamma(0.25))])))
    gammas.append(("Epsilon(0.1) on linear layers", Composite([("linear", Epsilon(0.1))])))
    return [*((name, name) for name in names), *gammas]


def _is_grid(rules: Any) -> bool:
    return (
        isinstance(rules, Mapping)
        and bool(rules)
        and all(
            isinstance(some, (list, tuple)) and some and all(isinstance(r, Rule) for r in some)
            for some in rules.values()
        )
    )


def _named(rules: Any) -> list[tuple[str, RulesLike]]:
    if isinstance(rules, Mapping):
        return [(str(name), candidate) for name, candidate in rules.items()]
    if isinstance(rules, (str, Composite, Rule)) or not isinstance(rules, Iterable):
        raise InputError(
            f"rules={rules!r} is no list of candidates.", fix="give several: rules=[..., ...]."
        )
    return [(_name(candidate), candidate) for candidate in rules]


def _name(candidate: Any) -> str:
    if isinstance(candidate, str):
        return candidate
    composite = read_rules(candidate)
    return composite.name if composite.name != "rules" else _told(composite.entries)


def _told(entries: Iterable[Entry]) -> str:
    return ", ".join(f"{rule} on {describe(selector)}" for selector, rule in entries)


def _search(
    grid: Mapping[Any, Sequence[Rule]],
    over: RulesLike,
    attempt: Callable[[str, RulesLike], Trial],
    budget: int | None,
    progress: bool,
) -> None:
    """Try the combinations of a grid, all or one selector after the other."""
    selectors, options = list(grid), [list(some) for some in grid.values()]
    base = None if over is None else read_rules(over)
    done: dict[tuple[int, ...], float] = {}

    def value(choice: tuple[int, ...]) -> float:
        if choice not in done:
            picked = [some[k] for some, k in zip(options, choice, strict=True)]
            entries = list(zip(selectors, picked, strict=True))
            composite = Composite(entries) if base is None else base + entries
            done[choice] = attempt(_told(entries), composite).mean
        return done[choice]

    number = 1
    for some in options:
        number *= len(some)
    most = _ALL if budget is None else budget
    if number <= most:
        every = list(itertools.product(*(range(len(some)) for some in options)))
        for choice in shown(every, "rules", progress):
            value(choice)
        return
    best, better = (0,) * len(options), True
    value(best)
    while better and len(done) < most:
        better = False
        for at, some in enumerate(options):
            for k in range(len(some)):
                choice = (*best[:at], k, *best[at + 1 :])
                if len(done) >= most and choice not in done:
                    return
                if value(choice) > value(best):
                    best, better = choice, True


def _batches(data: Any, target: Any) -> list[tuple[Any, Any]]:
    """Inputs and target of each batch."""
    if isinstance(data, (Tensor, Mapping, tuple, list)):
        return [(data, target)]
    if isinstance(data, Dataset):
        # A loader draws from PyTorch's generator otherwise.
        data = DataLoader(data, batch_size=_BATCH, generator=torch.Generator())
    if not isinstance(data, Iterable):
        raise InputError(
            f"data is {type(data).__name__}.",
            fix="give inputs, a data set, or an iterable of batches.",
        )
    return list(_each(data, target))


def _each(data: Iterable[Any], target: Any) -> Iterator[tuple[Any, Any]]:
    for batch in data:
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if isinstance(target, str) and target == "label":
            if not pair:
                raise InputError(
                    'target="label" is of batches (inputs, labels).', fix="give such batches."
                )
            yield batch[0], batch[1]
        else:
            yield (tuple(batch) if isinstance(batch, list) else batch), target


def _numbers(found: Any) -> Tensor:
    values = torch.as_tensor(found).detach().double().cpu().reshape(-1)
    if not len(values) or not bool(values.isfinite().all()):
        raise InputError(
            f"the objective returned {found!r}.", fix="return finite numbers, one per sample."
        )
    return values


def _with_error(values: Tensor) -> str:
    error = 2 * float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{float(values.mean()):.4g} \N{PLUS-MINUS SIGN} {error:.2g}"
