"""Objects that hold tensors, such as key-value caches -> trees of their tensors, and back.

PyTorch's trees end at objects of classes that it does not know. Registering a class would change
what the user's own code makes of it; here an object is put into a wrapper that is registered.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: What is no tensor, and tells by comparison whether it is the same.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
#: What nobody changes, and is the same or is not.
_FIXED = (type, types.FunctionType, types.BuiltinFunctionType, torch.layout)
_CONTAINERS = (list, tuple, set, frozenset)


def opened(tree: Any) -> Any:
    """The tree, in which objects are nodes whose leaves are the tensors that they hold.

    Flattened and put together again, there are copies of the objects with these leaves in them.
    What cannot be copied so, such as modules and files, stays a leaf.
    """
    return pytree.tree_map(_open, tree)


def leaves_in(tree: Any) -> list[Any]:
    """All leaves, those inside of objects among them."""
    return pytree.tree_leaves(opened(tree))


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors, those inside of objects among them."""
    return [leaf for leaf in leaves_in(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class _Opened:
    """An object in parts: how it is built (comparable), its tensors, and their names."""

    plan: Any
    tensors: list[Tensor]
    names: list[str]


class _Parts:
    """Takes one object apart.

    A plan is a tuple: a word, then what belongs to it. What is met again is the same in the copy.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self._met: dict[int, int] = {}
        self._kept: list[Any] = []

    def plan(self, value: Any, name: str = "") -> Any:
        """How the value is built; TypeError if it cannot be."""
        if isinstance(value, PLAIN):
            return "plain", type(value), value
        if isinstance(value, _FIXED):
            return "fixed", value
        if (known := self._met.get(id(value))) is not None:
            return "again", known
        self._met[id(value)] = len(self._met)
        self._kept.append(value)
        if isinstance(value, Tensor):
            self.tensors.append(value)
            self.names.append(name)
            return ("tensor",)
        kind = type(value)
        if kind in _CONTAINERS:
            return kind.__name__, tuple(self._items(enumerate(value), name))
        if kind is dict:
            return "dict", tuple(self._items(value.items(), name))
        if not _is_plainly_made(value):
            raise TypeError(f"a {kind.__name__} cannot be taken apart")
        items = tuple(self._items(value.items(), name)) if isinstance(value, dict) else None
        return "object", kind, items, tuple(self._items(vars(value).items(), name))

    def _items(self, items: Any, name: str) -> Iterator[tuple[Any, Any]]:
        for key, value in items:
            if not isinstance(key, (str, int, type(None))):
                raise TypeError(f"the key {key!r} cannot be compared")
            yield key, self.plan(value, f"{name}.{key}" if name else str(key))


def _is_plainly_made(value: Any) -> bool:
    """Whether its attributes (and its items, of a dict) are all that there is of an object."""
    kind = type(value)
    made = kind.__new__ in (object.__new__, dict.__new__, OrderedDict.__new__)
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    acts = isinstance(value, (nn.Module, BaseException, types.MethodType))
    return made and not slots and not acts and isinstance(getattr(value, "__dict__", None), dict)


def _open(value: Any) -> Any:
    if isinstance(value, (Tensor, *PLAIN, *_FIXED)) or not _is_plainly_made(value):
        return value
    parts = _Parts()
    try:
        return _Opened(parts.plan(value), parts.tensors, parts.names)
    except (TypeError, RecursionError):
        return value


def _built(leaves: Iterable[Any], plan: Any) -> Any:
    """The object of a plan, with other leaves in the tensors' places."""
    values, made = iter(leaves), list[Any]()

    def build(plan: Any) -> Any:
        word, *rest = plan
        if word in ("plain", "fixed"):
            return rest[-1]
        if word == "again":
            return made[rest[0]]
        if word == "tensor":
            made.append(next(values))
            return made[-1]
        place = len(made)
        made.append(None)
        if word == "object":
            kind, items, attributes = rest
            new = made[place] = kind.__new__(kind)
            put = OrderedDict.__setitem__ if isinstance(new, OrderedDict) else dict.__setitem__
            for key, value in items or ():
                put(new, key, build(value))
            new.__dict__.update((key, build(value)) for key, value in attributes)
            return new
        if word == "dict":
            new = made[place] = {}
            new.update((key, build(value)) for key, value in rest[0])
            return new
        if word == "list":
            new = made[place] = []
            new.extend(build(value) for _, value in rest[0])
            return new
        kinds: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "set": set}
        made[place] = kinds.get(word, frozenset)(build(value) for _, value in rest[0])
        return made[place]

    return build(plan)


def _flatten(opened: _Opened) -> tuple[list[Any], Any]:
    return opened.tensors, opened.plan


def _flatten_with_keys(opened: _Opened) -> tuple[list[Any], Any]:
    named = zip(map(pytree.GetAttrKey, opened.names), opened.tensors, strict=True)
    return list(named), opened.plan


pytree.register_pytree_node(_Opened, _flatten, _built, flatten_with_keys_fn=_flatten_with_keys)
