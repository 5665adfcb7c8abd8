"""target -> seed: the relevance that the backward pass starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.capture import is_finite
from lrpfx.errors import TargetError


@dataclass(frozen=True)
class Slope:
    """The gradient of a target by the output, in the place of gradient times output.

    What follows (modified) gradients begins with it.

    Args:
        target: See ``lrpfx.explain``; of a floating tensor it is the tensor itself.
    """

    target: Any


Target = (
    None
    | int
    | Literal["all"]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | tuple[Any, ...]
    | Tensor
    | np.ndarray[Any, Any]
    | Callable[[Any], Tensor]
    | Slope
)


@dataclass(frozen=True)
class Seed:
    """Where relevance starts.

    Args:
        seeds: Per output leaf, the relevance to start from, None where there is none.
        classes: The explained class per sample, shape (N,), where the target is a class.
        description: For the report.
        kept: Of the masks and gates of conditions, what each lets through.
        notes: What the user may not expect of it.
        by_gradient: Whether it is a callable's gradient times output.
    """

    seeds: list[Tensor | None]
    classes: Tensor | None
    description: str
    kept: tuple[Tensor, ...] = ()
    notes: tuple[str, ...] = ()
    by_gradient: bool = False


def is_several(target: Any) -> bool:
    """Whether ``target`` asks for several explanations of each sample."""
    if isinstance(target, (Tensor, np.ndarray)):
        return target.ndim == 2 and not any(t in str(target.dtype) for t in ("float", "bool"))
    if isinstance(target, list) and target:
        arrays = (Tensor, np.ndarray)
        return all(isinstance(r, (list, tuple)) or isinstance(r, arrays) and r.ndim for r in target)
    return isinstance(target, str) and target == "all"


def each_target(leaves: Sequence[Any], target: Any) -> list[Tensor]:
    """Classes per sample, (N,), one tensor for each of several targets.

    Args:
        leaves: Output leaves of the graph.
        target: "all", or K classes for each of N samples.

    Raises:
        TargetError: There are no classes, or not equally many for each sample.
    """
    output = next((t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()), None)
    if output is None or output.ndim != 2:
        raise TargetError(
            "several targets need an output (N, C) of one score per class, not "
            f"{None if output is None else tuple(output.shape)}.",
            fix="give a callable for one of them at a time.",
        )
    n, size = output.shape
    if isinstance(target, str):
        return list(torch.arange(size, device=output.device)[:, None].expand(size, n))
    try:
        rows = [list(torch.as_tensor(row, device=output.device)) for row in target]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TargetError(
            f"targets {_shown(target)} cannot be read as classes: {error}.",
            fix=f"give a list of as many classes for each sample{_or_rules(target)}.",
        ) from error
    if len(rows) != n or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise TargetError(
            f"there are {n} samples, and targets for {len(rows)} of them: "
            f"{[len(row) for row in rows][:8]}.",
            fix="give a list of as many classes for each sample.",
        )
    table = torch.stack([torch.stack(row) for row in rows])
    if table.shape[1] == size > 2 and _is_one_hot(table):
        raise TargetError(
            "targets look like one-hot rows, and several targets are lists of classes.",
            fix="give target.argmax(1) for the classes, or target.float() as the seed.",
        )
    return list(table.unbind(1))


def _is_one_hot(table: Tensor) -> bool:
    if table.is_floating_point() or table.is_complex():
        return False
    return bool(((table == 0) | (table == 1)).all() and (table.sum(1) == 1).all())


def column_notes(target: Any) -> list[str]:
    """The note of one class per sample that is given as a column, which labels often are."""
    if not is_several(target) or isinstance(target, str) or len(target[0]) != 1:
        return []
    return [
        f"target has shape ({len(target)}, 1), which asks for 1 target of each sample in a "
        "dimension before the samples; for labels, without it, give labels.squeeze(1)"
    ]


def make_seed(
    leaves: Sequence[Any],
    target: Target,
    rebuild: Callable[[Sequence[Any]], Any],
    batched: Callable[[int], bool] = lambda index: True,
) -> Seed:
    """The seed relevance for ``target``, computed from the clean output.

    Args:
        leaves: Output leaves of the graph.
        target: See ``lrpfx.explain``; or a ``Slope``.
        rebuild: Makes the model's output from leaves, for callables.
        batched: Whether the first dimension of a leaf, given by its index, is the samples'.

    Raises:
        TargetError: The target does not fit the output.
    """
    times = not isinstance(target, Slope)
    target = target.target if isinstance(target, Slope) else target
    if callable(target) and not isinstance(target, Tensor):
        return _from_callable(leaves, target, rebuild, times)
    index = next(
        (i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()), None
    )
    if index is None:
        raise TargetError(
            "the model returns no floating tensor to explain.",
            fix="explain a wrapper module that returns the score in question.",
        )
    output: Tensor = leaves[index]
    alone = not _is_seed(target) and output.numel() > 1 and not batched(index)
    one = _entry(output, target) if alone else None
    if _is_seed(target):
        seed, classes, description = _given(output, target), None, "the given seed relevance"
    else:
        if one is not None:
            mask, description = _at_index(output[None], one)[0], f"output{list(one)}"
            classes, form = None, ", times output"
        else:
            mask, classes, description, form = _picked(output, target)
        value = output if times else torch.ones_like(output)
        # where and not *, as 0 times infinity is NaN
        seed = torch.where(mask, value, torch.zeros_like(output))
        description += form if times else ""
    notes = []
    if alone:
        notes.append(_without_batch(output, target, one))
    if target is None and output.ndim > 2:
        notes.append(_one_entry(output, seed))
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    if len(tensors) > 1:
        which = _which(rebuild(leaves), output, index)
        description += f" of {which} (the first of {len(tensors)} tensors)"
    seeds: list[Tensor | None] = [None] * len(leaves)
    seeds[index] = seed
    return Seed(seeds, classes, description, notes=tuple(notes))


def _which(returned: Any, output: Tensor, index: int) -> str:
    """What users know an output by: its key or field, where it has one."""
    named = returned if isinstance(returned, Mapping) else getattr(returned, "__dict__", {})
    key = next((key for key, value in named.items() if value is output), None)
    return f"output {index}" if key is None else f"output {key!r}"


def _is_seed(target: Any) -> bool:
    return isinstance(target, (Tensor, np.ndarray)) and "float" in str(target.dtype)


def _entry(output: Tensor, target: Any) -> tuple[Any, ...] | None:
    """The index of one entry, or of some, of an output without samples; None if it is not said."""
    whole = isinstance(target, (int, np.integer)) and not isinstance(target, bool)
    index = (target,) if whole else target
    return index if isinstance(index, tuple) and len(index) == output.ndim else None


def _without_batch(output: Tensor, target: Any, one: tuple[Any, ...] | None) -> str:
    """The note of an output whose first dimension is not the samples'; an error for None."""
    shape = tuple(output.shape)
    if target is None:
        raise TargetError(
            f"target=None is the strongest output of each sample, and the output {shape} has no "
            "dimension of samples.",
            fix="give a batch of one, x[None]; or say what is explained: an index (tuple), a "
            "callable, or the seed.",
        )
    if one is not None:
        return f"the output {shape} has no dimension of samples: explained is output{list(one)}"
    return (
        f"dimension 0 of the output {shape} is not the samples': all of its entries are explained"
    )


def _one_entry(output: Tensor, seed: Tensor) -> str:
    """The note that names what target=None explains of maps and sequences."""
    best = seed.detach().flatten(1).abs().argmax(1).tolist()
    places = [
        [i, *map(int, np.unravel_index(place, tuple(output.shape[1:])))]
        for i, place in enumerate(best)
    ]
    shown = ", ".join(f"output{place}" for place in places[:3]) + (", ..." * (len(places) > 3))
    return (
        f"target=None explains one entry of each sample's output {list(output.shape[1:])}, the "
        f"strongest: {shown}"
    )


def _given(output: Tensor, target: Any) -> Tensor:
    """A seed that was given, if it fits the output."""
    target = _from_numpy(target) if isinstance(target, np.ndarray) else target
    if target.shape != output.shape:
        raise TargetError(
            f"a seed must be shaped like the output {tuple(output.shape)}, "
            f"got {tuple(target.shape)}.",
            fix="give a floating tensor of that shape, or integer classes of shape (N,).",
        )
    if target.is_meta:
        raise TargetError("the seed has no values: it is on the meta device.", fix="give it.")
    if target.layout != torch.strided:
        raise TargetError("the seed is a sparse tensor.", fix="give seed.to_dense().")
    if not is_finite(target):
        raise TargetError("the seed has NaN or infinite entries.", fix="give finite numbers.")
    seed: Tensor = target.to(output)
    return seed


def _picked(output: Tensor, target: Any) -> tuple[Tensor, Tensor | None, str, str]:
    """Which entries are explained: a mask, the classes, its description, and that of the seed."""
    if isinstance(target, np.ndarray):
        target = _from_numpy(target)
    if target is None:
        return _strongest(output)
    if isinstance(target, tuple):
        mask = _at_index(output, target)
        return mask, None, f"output[:, {', '.join(map(str, target))}]", ", times output"
    classes = _classes(output, target)
    mask = torch.zeros_like(output, dtype=torch.bool)
    mask[torch.arange(len(classes), device=output.device), classes] = True
    one = f"class {int(classes[0])}" if len(set(classes.tolist())) == 1 else "class per sample"
    if output.ndim > 2:
        one += f" (dimension 1, all of {list(output.shape[2:])})"
    return mask, classes, one, ", one-hot times output"


def _from_numpy(target: np.ndarray[Any, Any]) -> Tensor:
    try:
        return torch.from_numpy(target)
    except (TypeError, ValueError) as error:  # strings, objects, negative strides
        raise TargetError(
            f"target {_shown(target)} cannot be read as a tensor: {error}.",
            fix="give an array of integers (one class per sample) or floats (the seed).",
        ) from error


def _strongest(output: Tensor) -> tuple[Tensor, Tensor | None, str, str]:
    if output.ndim < 2:
        return torch.ones_like(output, dtype=torch.bool), None, "the output value", ""
    flat = output.detach().flatten(1)
    best = flat.argmax(1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[torch.arange(len(best), device=best.device), best] = True
    classes = best if output.ndim == 2 else None
    if flat.shape[1] == 1:
        return mask.reshape(output.shape), classes, "the output value", ""
    text = "strongest output per sample (argmax)"
    return mask.reshape(output.shape), classes, text, ", one-hot times output"


def _at_index(output: Tensor, index: tuple[Any, ...]) -> Tensor:
    mask = torch.zeros_like(output, dtype=torch.bool)
    try:
        for part, size in zip(index, output.shape[1:], strict=False):
            if isinstance(part, bool) or part is None:
                raise TypeError(f"{part} is no index")
            if isinstance(part, (int, np.integer)) and not -size <= part < size:
                raise IndexError(f"index {part} is out of range for size {size}")
        mask[(slice(None), *index)] = True
        if not bool(mask.any()):
            raise IndexError("it selects nothing")
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise TargetError(
            f"target {index!r} is no index into a sample's output {tuple(output.shape[1:])}: "
            f"{error}.",
            fix="a tuple indexes one sample's output; give a list for one class per sample"
            + ", or a batch of one, x[None], if this is one sample." * (len(index) >= output.ndim)
            + "." * (len(index) < output.ndim),
        ) from error
    return mask


def _classes(output: Tensor, target: Any) -> Tensor:
    """One class per sample, shape (N,)."""
    if output.ndim < 2:
        raise TargetError(
            f"the output {tuple(output.shape)} has no class dimension for target {_shown(target)}.",
            fix="leave target=None to explain the value itself.",
        )
    n, size = output.shape[:2]
    if isinstance(target, Tensor) and target.dtype == torch.bool:
        kept = "out" if target.shape == output.shape else "out[:, k]"
        raise TargetError(
            f"target is a mask of shape {tuple(target.shape)}, which names no class.",
            fix=f"add up what it keeps: lambda out: ({kept} * mask).flatten(1).sum(1).",
        )
    try:
        if isinstance(target, (bool, str)):
            raise TypeError(f"{target!r} is no class")
        classes = torch.as_tensor(target, device=output.device)
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise TypeError(f"classes must be integers, not {classes.dtype}")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TargetError(
            f"target {_shown(target)} cannot be read as classes: {error}.",
            fix="give an int, one int per sample, an index tuple, a callable, or a seed "
            f"tensor{_or_rules(target)}.",
        ) from error
    classes = classes.long()
    if output.ndim == 3:
        _refuse_sequence(output, classes)
    if classes.ndim == 0:
        classes = classes.expand(n)
    if classes.shape != (n,):
        raise TargetError(
            f"target has shape {tuple(classes.shape)}, but there are {n} samples.",
            fix="give one class for all, or one per sample; an index into a sample is a tuple.",
        )
    outside = (classes < -size) | (classes >= size)
    if bool(outside.any()):
        raise TargetError(
            f"target {sorted(set(classes[outside].tolist()))} is out of range: dimension 1 of the "
            f"output {tuple(output.shape)} has {size} classes, 0 to {size - 1}.",
            fix="choose a class in that range; negative ones count from the end.",
        )
    return torch.where(classes < 0, classes + size, classes)


def _shown(target: Any) -> str:
    """A target in a line."""
    text = repr(target)
    if len(text) < 80 and "\n" not in text:
        return text
    if isinstance(target, (Tensor, np.ndarray)):
        return f"of {target.dtype} {tuple(target.shape)}"
    return f"of type {type(target).__name__}"


def _or_rules(target: Any) -> str:
    """The repair for rules that were given in the place of the target."""
    numbers = isinstance(target, (int, float, complex, Tensor, np.ndarray))
    return "" if numbers else "; rules come after the target, or as rules="


def _refuse_sequence(output: Tensor, classes: Tensor) -> None:
    """Raise TargetError: of (N, T, V) a class is a token, and of (N, C, L) a channel."""
    shape = tuple(output.shape)
    if classes.ndim:
        raise TargetError(
            f"classes per sample may stand in dimension 1 or 2 of the output {shape}.",
            fix="say which by a callable, such as lambda out: out[range(len(out)), -1, tokens] for "
            "tokens after the last position.",
        )
    k = int(classes)
    raise TargetError(
        f"target={k} may stand in dimension 1 or 2 of the output {shape}.",
        fix=f"for token {k} of (N, T, V) give the position, too: (-1, {k}), or (slice(None), {k}) "
        f"for all positions; for channel {k} of (N, C, L), at all places, give ({k},).",
    )


def _from_callable(
    leaves: Sequence[Any],
    target: Callable[[Any], Tensor],
    rebuild: Callable[[Sequence[Any]], Any],
    times: bool,
) -> Seed:
    """Gradient, times output: one-hot times the value where the callable picks outputs."""
    keep = torch.is_grad_enabled()
    inner = [_variable(leaf, keep) for leaf in leaves]
    variables = [t for t in inner if isinstance(t, Tensor) and t.requires_grad]
    name = getattr(target, "__name__", type(target).__name__)
    with torch.enable_grad():
        try:
            # Copies: a target may write into the output, which is still read after it.
            value = target(rebuild([t.clone() if isinstance(t, Tensor) else t for t in inner]))
        except Exception as error:  # it is the user's, and may raise anything
            raise TargetError(
                f"target {name} fails on the model's output: {type(error).__name__}: {error}",
                fix="it is called with what the model returns.",
            ) from error
        _check_value(value, name, [len(t) for t in variables if t.ndim] or [1])
        grads = torch.autograd.grad(value.sum(), variables, create_graph=keep, allow_unused=True)
    by_id = {id(t): g for t, g in zip(variables, grads, strict=True)}
    slopes = [by_id.get(id(t)) for t in inner]
    if not times:
        return Seed(slopes, None, f"callable {name}", by_gradient=True)
    pairs = zip(slopes, inner, strict=True)
    seeds = [None if g is None else g * (t if keep else t.detach()) for g, t in pairs]
    description = f"callable {name}, its gradient times output"
    notes = tuple(_other_value(name, value, seeds))
    return Seed(seeds, None, description, notes=notes, by_gradient=True)


def _check_value(value: Any, name: str, sizes: Sequence[int]) -> None:
    """Raise TargetError unless a callable returned one number per sample that can be explained."""
    fits = (
        isinstance(value, Tensor)
        and not value.is_complex()
        and (value.ndim == 0 or (value.ndim == 1 and len(value) in (*sizes, 1)))
    )
    if isinstance(value, Tensor) and not value.numel():
        raise TargetError(
            f"target {name} picks nothing of the model's output: shape {tuple(value.shape)}.",
            fix="a detector that finds nothing returns no boxes: pick what is there.",
        )
    if not fits:
        form = (
            f"{value.dtype} of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise TargetError(
            f"target {name} must return one number per sample, shape ({sizes[0]},), or one number "
            f"in all, not {form}.",
            fix="for example target=lambda out: out[:, 3].",
        )
    if not value.requires_grad:
        raise TargetError(
            f"target {name} does not depend on the model's output.",
            fix="it must compute its value from its argument by differentiable ops.",
        )


def _other_value(name: str, value: Tensor, seeds: Sequence[Tensor | None]) -> Iterator[str]:
    """The note of a callable whose value is not the sum of its seed, with both numbers."""
    given = [seed.detach() for seed in seeds if seed is not None]
    if not given:
        return
    n = len(value) if value.ndim else 0
    by_sample = n > 0 and all(seed.ndim and len(seed) == n for seed in given)
    rows = [seed.double().reshape(n if by_sample else 1, -1) for seed in given]
    sums = torch.stack([row.sum(1) for row in rows]).sum(0)
    sizes = torch.stack([row.abs().sum(1) for row in rows]).sum(0)
    values = (
        value.detach().double().reshape(-1) if by_sample else value.detach().double().sum()[None]
    )
    apart = (values - sums).abs() - _tolerance(value.dtype) * torch.maximum(sizes, values.abs())
    worst = int(apart.argmax())
    if apart[worst] > 0:
        sample = f" for sample {worst}" if by_sample and n > 1 else ""
        yield (
            f"target {name} is {values[worst]:.4g}{sample}, and its gradient times output, which "
            f"is what is explained, sums to {sums[worst]:.4g} (it is not linear in the output)"
        )


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)


def _variable(leaf: Any, keep: bool) -> Any:
    """The leaf as a variable of its own: of two outputs one may be computed from the other."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    if keep and leaf.requires_grad:
        return leaf.view_as(leaf)
    return leaf.detach().requires_grad_()


def unflatten(spec: pytree.TreeSpec) -> Callable[[Sequence[Any]], Any]:
    """``leaves -> output`` for an output's tree structure."""
    return lambda leaves: pytree.tree_unflatten(list(leaves), spec)
