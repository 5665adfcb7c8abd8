"""A model and a batch of its inputs -> a function of the tensors that are explained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrpfx.capture import (
    TRACING,
    Inputs,
    Wrt,
    chosen_inputs,
    flatten_inputs,
    input_paths,
    is_explained,
    is_finite,
    preserved,
    run_given,
    tensors_in,
)
from lrpfx.errors import InputError, NonFiniteError, TrainingModeError, counted
from lrpfx.explain import Explainer
from lrpfx.probe.lookups import Lookup, Lookups
from lrpfx.probe.score import Score

#: What is explained: a module, an Explainer, which stands for its model, or any function.
ModelLike = nn.Module | Explainer | Callable[..., Any]
#: Bytes of activations that go through the model together, about.
MEMORY = 2**28
#: So many copies of a batch go through the model together at most.
_MOST = 64


@dataclass(frozen=True)
class Start:
    """A tensor that is explained.

    Args:
        leaf: The number of the flat input that it is, or whose token ids pick its rows.
        value: The input, or the rows, (..., D).
        places: For each row the position of its id in the flat input, negative for none; None for
            a floating input.
    """

    leaf: int
    value: Tensor
    places: Tensor | None = None


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.eval()
        self.forward = function  # with the names of its parameters


class Subject:
    """A model at one batch of inputs.

    Args:
        model: Runs once, to see what it returns and which embeddings token ids index.
        inputs: As ``lrpfx.explain`` takes them.
        wrt: As ``lrpfx.explain`` takes it.
        slopes: Whether gradients are wanted: the output then keeps its graph.

    Raises:
        InputError: There is nothing to explain, or the model fails on the inputs.
        TrainingModeError: The model's output is random, or mixes the batch.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, wrt: Wrt, slopes: bool) -> None:
        self.model, self.inputs, self.wrt = model, inputs, wrt
        given, self.spec = flatten_inputs(inputs)
        self.paths = input_paths(inputs)
        self.leaves = [_own(leaf) for leaf in given]
        chosen = chosen_inputs(model, inputs, wrt)
        wanted = None if chosen is None else {i for leaves in chosen.values() for i in leaves}
        tensors = [(i, t) for i, t in enumerate(self.leaves) if isinstance(t, Tensor)]
        tensors = [(i, t) for i, t in tensors if wanted is None or i in wanted]
        self.ids = {i: t for i, t in tensors if t.dtype in (torch.int32, torch.int64)}
        floating = [Start(i, t.requires_grad_(slopes)) for i, t in tensors if is_explained(t)]
        _refuse_infinite(floating, self.paths)
        _refuse_training(model)
        self.output, lookups, self.saved = self._first(slopes)
        rows = [self._rows(lookup) for lookup in lookups]
        self.starts: list[Start] = [*floating, *rows]
        self.chosen_ids = set(self.ids) if wanted is not None else {s.leaf for s in rows}
        if not self.starts and not self.chosen_ids:
            raise InputError(
                "there is nothing to explain: only floating inputs are explained, and integers "
                "that an embedding is indexed by.",
                where=[f"inputs: {', '.join(self.paths)}"],
                fix="give the input as a floating tensor, or its embedding.",
            )
        first = self.leaves[(self.starts[0].leaf if self.starts else min(self.chosen_ids))]
        self.n = len(first) if first.ndim else 1

    @property
    def values(self) -> list[Tensor]:
        """What is explained, as it is."""
        return [start.value for start in self.starts]

    def run(self, values: Sequence[Tensor | None], leaves: Sequence[Any] | None = None) -> Any:
        """What the model returns for other values of what is explained.

        Args:
            values: One for each start, None for what the leaves give; of several copies of the
                batch one behind the other.
            leaves: The flat inputs, likewise; None for those of the subject.
        """
        flat = list(self.leaves if leaves is None else leaves)
        put: list[Tensor | None] = []
        for start, value in zip(self.starts, values, strict=True):
            if start.places is not None:
                put.append(value)
            elif value is not None:
                flat[start.leaf] = value
        return self._call(flat, put or None)[0]

    def looked_up(self, leaves: Sequence[Any]) -> list[Tensor]:
        """What other token ids pick, for each start that has some."""
        with torch.no_grad():
            return [lookup.vectors for lookup in self._call(leaves, None)[1]]

    def repeated(self, copies: int) -> list[Any]:
        """The flat inputs, so many copies of the batch one behind the other."""
        return [
            torch.cat([leaf] * copies) if isinstance(leaf, Tensor) and copies > 1 else leaf
            for leaf in self.leaves
        ]

    def copies(self, score: Score, memory: int, wanted: int) -> int:
        """How many copies of the batch go through the model together.

        One, where the first dimension of something is not that of the samples, where a target is
        called with the output, and where a second copy changes the scores of the first.

        Args:
            score: What is explained.
            memory: Bytes that activations may take.
            wanted: How many there are in all.
        """
        sized = [t for t in self.leaves if isinstance(t, Tensor)]
        fits = all(t.ndim and len(t) == self.n for t in sized) and score.repeats(self.n)
        fits = fits and all(len(v) % self.n == 0 for v in self.values)
        number = min(wanted, _MOST, max(1, memory // max(self.saved, 1)))
        if number < 2 or not fits:
            return 1
        with torch.no_grad():
            once = score(self.output)
            both = [torch.cat([v, v / 2]) for v in self.values]  # another, that would disturb it
            try:
                twice = score(self.run(both, self.repeated(2)))
            except (RuntimeError, IndexError, ValueError, TypeError, AssertionError):
                return 1
        same = len(twice) == 2 * len(once) and torch.allclose(
            twice[: len(once)], once, rtol=1e-3, atol=1e-5
        )
        return number if same else 1

    def _first(self, slopes: bool) -> tuple[Any, list[Lookup], int]:
        """The output, what token ids picked on the way, and bytes that the run saved."""
        saved: dict[int, int] = {}
        own = {t.data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}

        def weigh(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        try:
            if slopes:
                with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
                    output, lookups = self._call(self.leaves, None)
            else:
                output, lookups = self._call(self.leaves, None)
        except Exception:  # the model is the user's, and may raise anything
            run_given(self.model, self.leaves, self.spec)  # an error that says more, if it fails
            raise
        given = [*(t for t in self.leaves if is_explained(t)), *(f.vectors for f in lookups)]
        most = 32 * sum(t.nbytes for t in given) + 4 * sum(t.nbytes for t in tensors_in(output))
        return output, lookups, sum(saved.values()) or most

    def _call(
        self, flat: Sequence[Any], put: list[Tensor | None] | None
    ) -> tuple[Any, list[Lookup]]:
        """Run the model on copies, as it may write into its inputs."""
        flat = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in flat]
        args, kwargs = torch.utils._pytree.tree_unflatten(flat, self.spec)
        followed = {i: flat[i] for i in self.ids}
        if not followed:
            return self.model(*args, **kwargs), []
        with Lookups(followed, put) as lookups:
            return self.model(*args, **kwargs), lookups.found

    def _rows(self, lookup: Lookup) -> Start:
        if lookup.places is None:
            raise InputError(
                "token ids index an embedding after something that does not keep them apart.",
                where=[f"{self.paths[lookup.source]}: looked up {tuple(lookup.vectors.shape)}"],
                fix="explain the embeddings: a wrapper module that takes them in place of the ids.",
            )
        return Start(lookup.source, lookup.vectors, lookup.places)


@contextlib.contextmanager
def subject_of(
    model: ModelLike, inputs: Inputs, wrt: Wrt = None, *, slopes: bool = True
) -> Iterator[Subject]:
    """A subject, whose model and the user's random states stay as they are.

    Args:
        model: A module, a function, or an Explainer, which stands for its model.
        inputs: See ``Subject``; so are ``wrt`` and ``slopes``.
        wrt: None for that of an Explainer.
        slopes: See ``Subject``.
    """
    if isinstance(model, Explainer):
        wrt = model.wrt if wrt is None else wrt
        model = model.model
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise InputError(
                f"the model is {type(model).__name__}.", fix="give a torch.nn.Module or a function."
            )
        model = _Function(model)
    # Autograd is off for good in what inference mode creates; another thread's trace may hold fake
    # tensors in the model.
    with (
        TRACING,
        torch.inference_mode(False),
        torch.set_grad_enabled(slopes),
        preserved(model),
    ):
        yield Subject(model, inputs, wrt, slopes)


def _own(leaf: Any) -> Any:
    """The leaf outside of the caller's autograd graph."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _refuse_infinite(starts: Sequence[Start], paths: Sequence[str]) -> None:
    bad = [paths[s.leaf] for s in starts if not is_finite(s.value)]
    if bad:
        raise NonFiniteError(
            "the inputs have NaN or infinite entries.", where=bad, fix="clean them first."
        )


def _refuse_training(model: nn.Module) -> None:
    """Raise TrainingModeError for modules that are random or mix the batch."""
    bad = [
        (f"{type(module).__name__} is in training mode", name or "(the model)", "")
        for name, module in model.named_modules()
        if module.training
        and (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
            or (isinstance(module, nn.RNNBase) and module.dropout > 0)
        )
    ]
    if bad:
        raise TrainingModeError(
            "the model is in training mode: its output is random or depends on the other samples.",
            where=counted(bad),
            fix="call model.eval() first.",
        )


def structured(flat: Sequence[Any], subject: Subject) -> Any:
    """One value per flat input, in the structure of the inputs as they were given."""
    args, kwargs = torch.utils._pytree.tree_unflatten(list(flat), subject.spec)
    if isinstance(subject.inputs, Tensor):
        return args[0]
    if isinstance(subject.inputs, Mapping):
        return {key: kwargs[key] for key in subject.inputs}
    return tuple(args)


def for_each(subject: Subject, given: Any, what: str) -> list[Any]:
    """One value for each flat input: one for all, or structured like the inputs.

    Raises:
        InputError: It is structured otherwise.
    """
    single = given is None or isinstance(given, (int, float, str))
    if single or (isinstance(given, Tensor) and isinstance(subject.inputs, Tensor)):
        return [given] * len(subject.leaves)
    values = flatten_inputs(given)[0] if isinstance(given, (dict, tuple, list)) else []
    if len(values) != len(subject.leaves):
        raise InputError(
            f"{what} is structured otherwise than the inputs: {len(values)} for "
            f"{len(subject.leaves)} of them.",
            fix="give a number, or one number or tensor for each input, structured like them.",
        )
    return values


def fitted(value: Any, like: Tensor, what: str) -> Tensor:
    """A number or tensor in the shape of an input.

    Raises:
        InputError: It cannot be broadcast to it.
    """
    try:
        tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        return tensor.broadcast_to(like.shape)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{what} cannot be broadcast to {tuple(like.shape)}: {error}",
            fix="give a number, or a tensor of that shape.",
        ) from error
