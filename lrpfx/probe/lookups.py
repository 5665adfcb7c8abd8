"""Token ids -> the rows of embeddings that they pick while a model runs, which can be replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

#: Places of token ids begin here, so that no id that a model puts in between is taken for one.
_BEGIN = 1 << 40
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
#: Functions by their names, which those of ``torch`` and of tensors share.
_MOVES = set(
    "getitem cat concat stack flip roll reshape flatten transpose permute t squeeze unsqueeze "
    "split chunk unbind narrow select index_select gather movedim unflatten tile view view_as "
    "expand expand_as repeat pad swapaxes hstack vstack".split()
)
#: What computes entries one by one.
_POINTWISE = set(
    "add radd iadd sub isub rsub subtract mul rmul imul multiply floor_divide floordiv remainder "
    "mod clamp clamp_min clamp_max clip where masked_fill to type long int short cpu cuda "
    "contiguous clone detach abs neg maximum minimum bitwise_and bitwise_or and or".split()
)
#: What takes no more than the shape of its argument.
_FRESH = set(
    "full_like zeros_like ones_like empty_like rand_like randint_like new_full new_zeros new_ones "
    "new_empty new_tensor".split()
)


@dataclass(frozen=True)
class Lookup:
    """One lookup in an embedding.

    Args:
        source: Which of the inputs holds the ids.
        vectors: What was looked up, (..., D).
        places: For each row of it the position of its id in the flat input, negative for those
            that the model put in; None if that cannot be told.
    """

    source: int
    vectors: Tensor
    places: Tensor | None


class Lookups(TorchFunctionMode):
    """Follows token ids through a run of a model to the embeddings that they index.

    Args:
        ids: The tensors of token ids, by the number of the input.
        put: What is returned in the place of the lookups, in their order; None to leave one, or
            all.
    """

    def __init__(
        self, ids: Mapping[int, Tensor], put: Sequence[Tensor | None] | None = None
    ) -> None:
        super().__init__()
        self.found: list[Lookup] = []
        self._put = put
        self._followed: dict[int, tuple[Tensor, int, Tensor | None]] = {}
        for source, tensor in ids.items():
            places = None
            if put is None:
                places = torch.arange(tensor.numel(), device=tensor.device) + _BEGIN
                places = places.reshape(tensor.shape)
            self._followed[id(tensor)] = tensor, source, places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if id(t) in self._followed]
        if not given or _name(func) in _FRESH:
            return result
        _, source, places = self._followed[id(given[0])]
        if _is_integer(result):
            self._follow(func, args, kwargs, result, source)
        elif isinstance(result, Tensor) and _looks_up(func, args, kwargs):
            put = None if self._put is None else self._put[len(self.found)]
            vectors = result if put is None else put
            if self._put is None:
                vectors = vectors.detach().requires_grad_(torch.is_grad_enabled())
                places = None if places is None else places.flatten() - _BEGIN
            self.found.append(Lookup(source, vectors, places))
            return vectors
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any, source: int) -> None:
        """Remember what was computed from ids, and where its entries come from."""
        places: list[Tensor | None] = []
        results = [result] if isinstance(result, Tensor) else list(result)
        if self._put is None:
            places = self._moved(func, args, kwargs, results)
        for i, tensor in enumerate(results):
            if tensor.dtype != torch.bool:
                self._followed[id(tensor)] = tensor, source, places[i] if places else None

    def _moved(
        self, func: Any, args: Any, kwargs: Any, results: Sequence[Any]
    ) -> list[Tensor | None]:
        known = self._followed

        def place(leaf: Any) -> Any:
            return known[id(leaf)][2] if id(leaf) in known else leaf

        sources = {known[id(t)][1] for t in pytree.tree_leaves((args, kwargs)) if id(t) in known}
        own = [known[id(t)][2] for t in pytree.tree_leaves((args, kwargs)) if id(t) in known]
        shape = None if own[0] is None else own[0].shape
        if len(sources) > 1 or any(p is None for p in own):
            return [None] * len(results)
        if _name(func) in _MOVES:
            try:
                moved = func(*pytree.tree_map(place, args), **pytree.tree_map(place, kwargs))
            except (TypeError, RuntimeError, IndexError):
                return [None] * len(results)
            return [moved] if isinstance(moved, Tensor) else list(moved)
        pointwise = _name(func) in _POINTWISE or func == _DATA
        return [own[0] if pointwise and t.shape == shape else None for t in results]


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", "")).strip("_")


def _is_integer(result: Any) -> bool:
    tensors = [result] if isinstance(result, Tensor) else result
    if not isinstance(tensors, (tuple, list)) or not tensors:
        return False
    return all(
        isinstance(t, Tensor) and not t.is_floating_point() and not t.is_complex() for t in tensors
    )


def _looks_up(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether rows of a table are picked by ids."""
    name = _name(func)
    if name == "embedding":
        return True
    table = args[0] if args else None
    if not isinstance(table, nn.Parameter) or not table.is_floating_point():
        return False
    if name == "getitem":
        return isinstance(args[1], Tensor)
    return name == "index_select" and (args[1] if len(args) > 1 else kwargs.get("dim")) == 0
