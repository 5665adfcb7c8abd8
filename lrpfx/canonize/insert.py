"""New nodes, with the provenance of others and a value of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from lrpfx.ops import nodes_in


def insert(
    like: fx.Node,
    target: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    known: Any = None,
) -> fx.Node:
    """A call at the graph's insert point, with the provenance of ``like`` and its own value.

    Args:
        like: Whose provenance it has.
        target: What is called.
        args: Its arguments.
        kwargs: By name.
        known: Its value, where numbers decide the form of it: of what a mask picks.
    """
    new = like.graph.call_function(target, tuple(args), dict(kwargs or {}))
    keep = ("nn_module_stack", "stack_trace", "torch_fn")
    new.meta = {key: like.meta[key] for key in keep if key in like.meta}
    values = fx.node.map_arg((new.args, new.kwargs), lambda n: n.meta["val"])
    assert isinstance(values, tuple)
    mode = fake_mode(nodes_in((new.args, new.kwargs)))
    try:
        new.meta["val"] = _value(target, *values, mode)
    except DynamicOutputShapeException:
        if known is None:
            raise
        new.meta["val"] = known
    return new


@torch.no_grad()
def _value(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode | None) -> Any:
    """What the call returns, without numbers."""
    if mode is not None:
        with mode, enable_python_dispatcher():
            return target(*args, **kwargs)
    try:
        value = target(*args, **kwargs)
    except NotImplementedError:  # of an op that PyTorch runs on fake tensors only
        mode, (args, kwargs) = faked((args, kwargs))
        with mode, enable_python_dispatcher():
            value = target(*args, **kwargs)
    return pytree.tree_map_only(Tensor, _empty, value)


def fake_mode(nodes: Iterable[fx.Node]) -> FakeTensorMode | None:
    """The mode of the fake tensors that nodes have for values; None if those are on "meta"."""
    values = pytree.tree_leaves([n.meta["val"] for n in nodes])
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


def faked(values: Any) -> tuple[FakeTensorMode, Any]:
    """Values on "meta" as fake tensors, and their mode."""
    mode, device = FakeTensorMode(), torch.device("cpu")
    with mode:
        return mode, pytree.tree_map_only(Tensor, lambda t: FakeTensor(mode, t, device), values)


def _empty(value: Tensor) -> Tensor:
    """Without numbers, which ops give that are told a device."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def copied(node: fx.Node, other: Mapping[fx.Node, fx.Node], like: fx.Node) -> fx.Node:
    """A node's call with others in the place of some of its inputs, as ``insert`` makes it."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: other.get(n, n))
    return insert(like, node.target, args, kwargs, node.meta["val"])
