"""New nodes, with the provenance of others and a value of their own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._prims_common import compute_elementwise_output_strides
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from lrpfx.ops import HELD, precision


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
    try:
        new.meta["val"] = value_of(target, values)
    except DynamicOutputShapeException:
        if known is None:
            raise
        new.meta["val"] = known
    return new


def value_of(target: Any, values: Any) -> Any:
    """What a call returns, as tensors without numbers.

    On "meta" the forms of the arguments decide that, and it is remembered by them: layers of one
    form are many, and PyTorch writes much of what finds it in Python.

    Args:
        target: What is called.
        values: Positional and keyword arguments, with tensors on "meta" or fake tensors.
    """
    if isinstance(target, torch._ops.OpOverload) and (key := _key(values)) is not None:
        return _built(_remembered(target, key, torch.get_default_dtype()))
    mode = fake_mode(values)
    if mode is None:
        return run_on_meta(target, values)
    with torch.no_grad(), mode, enable_python_dispatcher():
        return target(*values[0], **values[1])


#: Elements of the arguments up to which an op is tried.
_FEW = 1 << 16


def by_trying(target: torch._ops.OpOverload, values: Any) -> Any:
    """What an op returns, as ``run_on_meta``, by what it makes of ones; None if that is not tried.

    On "meta" PyTorch computes much of that in Python, and the first of these calls imports a
    compiler for a second. Ops of single entries are tried on single numbers, and their form is that
    of all; others of PyTorch's on few elements only.
    """
    leaves = pytree.tree_leaves(values)
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    pointwise = torch.Tag.pointwise in target.tags
    few = target.namespace == "aten" and sum(t.numel() for t in tensors) <= _FEW
    if not tensors or not (pointwise or few):
        return None
    if any(isinstance(leaf, torch.memory_format) for leaf in leaves):
        return None
    args, kwargs = pytree.tree_map_only(Tensor, _number if pointwise else _ones, values)
    try:
        with torch.no_grad():
            value = target(*args, **kwargs)
    except Exception:  # it takes no ones, or runs on other devices only
        return None
    if not pointwise:
        return pytree.tree_map_only(Tensor, _empty, value)
    if not isinstance(value, Tensor):
        return None
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    stride = compute_elementwise_output_strides(*(t.expand(shape) for t in tensors))
    return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")


def _number(like: Tensor) -> Tensor:
    return torch.ones([1] * like.ndim, dtype=like.dtype, device="cpu")


def _ones(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu").fill_(1)


def run_on_meta(target: Any, values: Any) -> Any:
    """The same of tensors on "meta", by running it."""
    with torch.no_grad():
        try:
            value = target(*values[0], **values[1])
        except NotImplementedError:  # of an op that PyTorch runs on fake tensors only
            mode, (args, kwargs) = faked(values)
            with mode, enable_python_dispatcher():
                value = target(*args, **kwargs)
        return pytree.tree_map_only(Tensor, _empty, value)


class _Form(NamedTuple):
    """What there is to a tensor without numbers."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


#: What has a value that can be compared, beside its type.
_PLAIN = (int, float, complex, str, type(None))
_FIXED = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def _key(value: Any) -> Any:
    """A value as one that can be looked up, by forms for tensors; None if it is more than that."""
    if type(value) is Tensor and value.is_meta and value.layout is torch.strided:
        return _Form(value.size(), value.stride(), value.dtype)
    if isinstance(value, _PLAIN + _FIXED):
        return type(value), value  # as True is 1, and 1 is 1.0
    if isinstance(value, dict):
        keys = tuple((k, _key(v)) for k, v in value.items())
        return None if any(key is None for _, key in keys) else (dict, keys)
    if isinstance(value, (tuple, list)):
        parts = tuple(map(_key, value))
        kind = tuple if isinstance(value, tuple) else list
        return None if None in parts else (kind, parts)
    return None


def _built(key: Any) -> Any:
    """A value of a key."""
    if isinstance(key, _Form):
        return torch.empty_strided(key.size, key.stride, dtype=key.dtype, device="meta")
    kind, value = key
    if kind is dict:
        return {name: _built(part) for name, part in value}
    return kind(map(_built, value)) if kind in (tuple, list) else value


@functools.lru_cache(4096)
def _remembered(target: Any, key: Any, default: torch.dtype) -> Any:
    """The key of what a call returns; the default dtype is that of quotients of integers."""
    value = by_trying(target, _built(key))
    found = _key(run_on_meta(target, _built(key)) if value is None else value)
    assert found is not None
    return found


def fake_mode(values: Any) -> FakeTensorMode | None:
    """The mode of the fake tensors among values; None if those are on "meta"."""
    leaves = pytree.tree_leaves(values)
    return next((v.fake_mode for v in leaves if isinstance(v, FakeTensor)), None)


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


#: Why what rounding makes is held.
ROUND_OFF = "round-off"


def replace(node: fx.Node, new: fx.Node, finest: int = 0) -> fx.Node:
    """Let what reads a node read another of the same value; at an insert point behind both.

    Args:
        node: The node.
        new: The other.
        finest: Bytes of a number in what the graph returns. Where a node has fewer, other ops
            round to other numbers than the model's own, by more than what it returns is rounded
            by: then their difference is added again, as a constant.

    Returns:
        What is read now.
    """
    if precision(node) < finest:
        more = insert(node, torch.ops.aten.sub.Tensor, (node, new))
        held = insert(node, torch.ops.aten.alias.default, (more,))
        held.meta[HELD] = ROUND_OFF
        new = insert(node, torch.ops.aten.add.Tensor, (new, held))
    for user in [n for n in node.users if new < n]:
        user.replace_input_with(node, new)
    return new
