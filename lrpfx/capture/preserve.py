"""The promise that the user's model stays as it was, whatever is done with it meanwhile."""

from __future__ import annotations

import operator
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def preserved(model: nn.Module, plainly: bool = False) -> Iterator[Callable[[], None]]:
    """Leave the model and the random states as they were, also when an error passes.

    Yields what brings back the model, and not the random states, before the end.

    Running or tracing a model can fill caches (with fake tensors), count calls, register hooks,
    update buffers and even rescale weights. Everything that the modules' attributes reach is
    remembered by value: tensors, containers, and the attributes of other objects. Only what has
    changed is written back, so that other threads may use the model meanwhile.

    Args:
        model: The model.
        plainly: Whether it only runs, and is not traced by PyTorch. Large parameters are then not
            copied before an op writes into them, which hardly a model does.
    """
    undo: list[_Undo] = []
    seen: set[int] = set()
    writes = _Writes()
    for module in model.modules():
        _remember(module, undo, seen, writes if plainly else None)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def bring_back() -> None:
        for restore, *remembered in undo:
            restore(*remembered)

    try:
        with writes if plainly else nullcontext():
            yield bring_back
    finally:
        bring_back()
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def reachable_only(model: nn.Module) -> Iterator[None]:
    """Without submodules that are named like a method, which no attribute reaches.

    PyTorch registers them, and its tracer looks for their parameters by that name.
    """
    before = []
    for module in list(model.modules()):
        hidden = [name for name in module._modules if hasattr(type(module), name)]
        if hidden:
            before.append((module._modules, dict(module._modules)))
        for name in hidden:
            del module._modules[name]
    try:
        yield
    finally:
        for modules, items in before:
            modules.clear()
            modules.update(items)


class _Writes(TorchDispatchMode):
    """Copies tensors before an op writes into their memory."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._awaited: dict[int, list[Callable[[], None]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # for that it would be imported

    def awaits(self, tensor: Tensor, then: Callable[[], None]) -> None:
        """Call ``then`` before something is written there."""
        self._awaited.setdefault(tensor.untyped_storage()._cdata, []).append(then)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            for value in pytree.tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and value.layout == torch.strided:
                    for then in self._awaited.pop(value.untyped_storage()._cdata, ()):
                        then()
        return func(*args, **kwargs or {})


#: What brings something back, and what it is given for that. Models have thousands of these, and
#: Python's garbage collector looks at each object: so they are few, and no closures.
_Undo = tuple[Any, ...]


def _remember(value: Any, undo: list[_Undo], seen: set[int], writes: _Writes | None = None) -> None:
    """Append to ``undo`` what brings ``value``, and all that it reaches, back to this moment."""
    if isinstance(value, _PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        large = isinstance(value, nn.Parameter) and value.nbytes > _LARGE
        undo.append(_tensor_undo(value, writes if large else None))
    elif isinstance(value, (dict, MutableMapping)):
        items = list(value.values())
        undo.append((_restore_mapping, value, list(value), items) if items else (_empty, value))
        for item in items:
            _remember(item, undo, seen, writes)
    elif isinstance(value, (list, deque, set)):
        items = list(value)
        undo.append((_restore_sequence, value, items) if items else (_empty, value))
        for item in items:
            _remember(item, undo, seen, writes)
    elif isinstance(value, (tuple, frozenset)):
        for item in value:
            _remember(item, undo, seen, writes)
    elif isinstance(attributes := getattr(value, "__dict__", None), dict) and not callable(value):
        _remember(attributes, undo, seen, writes)
    elif isinstance(value, nn.Module):
        _remember(value.__dict__, undo, seen, writes)


#: What nothing can change in.
_PLAIN = (type, str, bytes, int, float, complex, type(None))
#: Bytes of a parameter that is not copied as long as nothing is written into it.
_LARGE = 1 << 18


def _tensor_undo(tensor: Tensor, writes: _Writes | None) -> _Undo:
    memory = tensor.data
    copies = [] if writes is not None else [tensor.detach().clone()]
    if writes is not None:
        writes.awaits(tensor, lambda: copies.append(memory.clone()))
    return _restore_tensor, tensor, memory, copies


def _restore_tensor(tensor: Tensor, memory: Tensor, copies: list[Tensor]) -> None:
    if tensor.data_ptr() != memory.data_ptr():  # forward() has set .data
        tensor.data = memory
    for copy in copies:
        if not torch.equal(tensor, copy) and not _equal_with_nan(tensor, copy):
            with torch.no_grad():
                tensor.copy_(copy)


def _equal_with_nan(a: Tensor, b: Tensor) -> bool:
    return a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num())


def _restore_mapping(mapping: MutableMapping[Any, Any], keys: list[Any], items: list[Any]) -> None:
    if _are(mapping, keys) and _are(mapping.values(), items):
        return
    before = dict(zip(keys, items, strict=True))
    for key in [key for key in mapping if key not in before]:
        del mapping[key]
    for key, value in before.items():
        mapping[key] = value


def _restore_sequence(sequence: Any, items: list[Any]) -> None:
    if _are(sequence, items):
        return
    sequence.clear()
    if isinstance(sequence, set):
        sequence.update(items)
    else:
        sequence.extend(items)


def _empty(container: Any) -> None:
    if container:
        container.clear()


def _are(now: Collection[Any], before: list[Any]) -> bool:
    """Whether these are the very objects."""
    return len(now) == len(before) and all(map(operator.is_, now, before))
