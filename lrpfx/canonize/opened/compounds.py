"""Ops that PyTorch itself computes by others -> these others, as PyTorch has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lrpfx.canonize.insert import fake_mode, faked
from lrpfx.canonize.writer import Writer
from lrpfx.ops import nodes_in, varying

aten = torch.ops.aten

#: Whose parts have the rules that are meant. A name stands for all its overloads.
_OPENED = [aten.diff, aten.gradient, aten.kron, aten.addr]
_OPENED += [aten.trapezoid, aten.trapz, aten.cumulative_trapezoid]
_OPENED += [aten.column_stack, aten.pad_sequence, aten.cartesian_prod, aten.meshgrid]
_OPENED += [aten.atleast_1d, aten.atleast_2d, aten.atleast_3d, aten.broadcast_tensors]
_OPENED += [aten.diag, aten.diagflat, aten.linalg_diagonal, aten.dsplit, aten.hsplit, aten.vsplit]
_OPENED += [aten.fliplr, aten.flipud, aten.fft_fftshift, aten.fft_ifftshift, aten.msort]
_OPENED += [aten.adjoint, aten.mH, aten.matrix_H, aten.sum_to_size, aten.nanmean, aten.cross]
_OPENED += [aten.chain_matmul, aten.linalg_multi_dot, aten.linalg_vecdot]
_OPENED += [aten.matrix_power, aten.linalg_matrix_power, aten.vander, aten.linalg_vander]
_OPENED += [aten.float_power, aten.ldexp, aten.linalg_norm, aten.linalg_matrix_norm]
_OPENED += [aten.frobenius_norm, aten.dist, aten.pairwise_distance, aten.triplet_margin_loss]
_OPENED += [aten.l1_loss, aten.mse_loss, aten.smooth_l1_loss, aten.huber_loss]
#: All overloads of these.
COMPOUNDS = {getattr(packet, name) for packet in _OPENED for name in packet.overloads()}


def open_compounds(module: fx.GraphModule) -> fx.GraphModule:
    """``diff(x)`` -> ``x[1:] - x[:-1]``, and so on: what stands for others has their rules."""
    changing = varying(module.graph)
    for node in list(module.graph.nodes):
        if node.target not in COMPOUNDS or node not in changing:
            continue
        with module.graph.inserting_before(node):
            new = _written(node, Writer(node, module, changing))
        if new is None:
            continue
        if isinstance(new, fx.Node):
            node.replace_all_uses_with(new)
        for user in list(node.users):
            user.replace_all_uses_with(new[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    return module


def _written(node: fx.Node, op: Writer) -> Any:
    """What the parts return, or None if they hold more than ops of tensors."""
    inputs = list(dict.fromkeys(nodes_in((node.args, node.kwargs))))
    parts = _traced(node, inputs)
    if parts is None:
        return None
    copied: dict[fx.Node, Any] = {}
    names = iter(inputs)
    for n in parts.graph.nodes:
        if n.op == "placeholder":
            copied[n] = next(names)
        elif n.op == "get_attr":  # a number that PyTorch made a tensor of
            copied[n] = getattr(parts, str(n.target)).item()
        elif n.op == "call_function":
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), copied.__getitem__)
            copied[n] = op(n.target, *args, **kwargs)
    (results,) = next(iter(reversed(parts.graph.nodes))).args
    return fx.node.map_arg(results, copied.__getitem__)


def _traced(node: fx.Node, inputs: Sequence[fx.Node]) -> fx.GraphModule | None:
    def run(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    values = [n.meta["val"] for n in inputs]
    mode = fake_mode(values)
    if mode is None:  # on "meta" PyTorch opens more than the op
        mode, values = faked(values)
    assert isinstance(node.target, OpOverload)
    known: dict[Any, Any] = get_decompositions([node.target])
    with _numbers_allowed(mode), torch.no_grad(), enable_python_dispatcher():
        parts = make_fx(torch.func.functionalize(run), decomposition_table=known)(*values)
        if any(
            n.target._schema.is_mutable
            for n in parts.graph.nodes
            if isinstance(n.target, OpOverload)
        ):
            parts = make_fx(torch.func.functionalize(parts))(*values)  # of what the table wrote
    parts.graph.eliminate_dead_code()
    constants = [getattr(parts, str(n.target)) for n in parts.graph.nodes if n.op == "get_attr"]
    return parts if all(c.ndim == 0 for c in constants) else None


@contextmanager
def _numbers_allowed(mode: FakeTensorMode) -> Iterator[None]:
    """Meanwhile fake tensors go together with tensors of one number."""
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before
