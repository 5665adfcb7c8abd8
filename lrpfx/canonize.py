"""Named passes that bring every spelling of a network to one form, each verified on its own.

The graph that leaves here has no in-place ops, no regions, no no-ops, and no batch norm where the
algebra lets it be part of the affine op beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lrpfx.capture import tracing
from lrpfx.compose import flat_products, whole_activations
from lrpfx.errors import CaptureError, TrainingModeError
from lrpfx.graph import (
    HELD,
    bound_arguments,
    module_calls,
    nodes_in,
    source_line,
    used_nodes,
    verify,
)

aten = torch.ops.aten

Pass = Callable[[fx.GraphModule], fx.GraphModule]


def canonize(program: ExportedProgram) -> fx.GraphModule:
    """Run every pass of ``PASSES`` in order and verify the graph after each.

    Raises:
        TrainingModeError: The graph is random or mixes the batch.
        CaptureError: In-place ops that even PyTorch's own functionalisation leaves.
    """
    module = functionalize(program)
    verify(module.graph)
    for canonical in PASSES:
        module = canonical(module)
        verify(module.graph)
    module.recompile()
    return module


# -- in-place -> functional -----------------------------------------------------------------------


def functionalize(program: ExportedProgram) -> fx.GraphModule:
    """``y = relu_(x)`` -> ``y = relu(x)``; writes into views -> functional scatters.

    Renaming is exact where nothing reads the written storage later except through the in-place
    op's own result. Where something does, PyTorch's functionalisation rewrites the whole graph,
    at the cost of a second trace.
    """
    module = _unlifted(program)
    regions = any(_is_region(node, "autocast") for node in module.graph.nodes)
    if not regions and all(_is_private(node) for node in module.graph.nodes if _writes(node)):
        for node in [n for n in module.graph.nodes if _writes(n)]:
            _rename(node)
        return module
    with tracing():
        module = _unlifted(program.run_decompositions({}))
    for node in reversed([n for n in module.graph.nodes if _writes(n)]):
        if nodes_in(node.args)[0].op not in ("placeholder", "get_attr") or node.users:
            raise CaptureError(
                f"{node.target} writes into memory that other ops read, and could not be undone.",
                where=[source_line(node)],
                fix="write it without the in-place op.",
            )
        # What is left are write-backs to the user's inputs and buffers, which stay as they are.
        module.graph.erase_node(node)
    return module


def _unlifted(program: ExportedProgram) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _functional(node: fx.Node) -> Any:
    """``relu_.default`` -> ``relu.default``; None if there is no such op."""
    namespace, name = node.target._schema.name.split("::")  # type: ignore[union-attr]
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    return getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]


def _is_private(node: fx.Node) -> bool:
    """Whether the written memory is read later through the node's own result only.

    The fake tensors of a trace share storage exactly where the real ones do.
    """
    written = nodes_in(node.args)[0]
    storage = _storage(written)
    if storage is None or _functional(node) is None:
        return False
    before = True
    for other in node.graph.nodes:
        if other is node:
            before = False
        elif before and _storage(other) == storage:
            if any(user is not node and node < user for user in other.users):
                return False
    return True


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _rename(node: fx.Node) -> None:
    value: Tensor = node.meta["val"]
    with node.graph.inserting_before(node):
        new = _insert(node, _functional(node), node.args, node.kwargs)
        if new.meta["val"].dtype != value.dtype:  # in-place ops keep their dtype
            new = _insert(node, aten.to.dtype, (new, value.dtype))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _insert(
    like: fx.Node, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """A call at the graph's insert point, with the provenance of ``like`` and its own value."""
    new = like.graph.call_function(target, tuple(args), dict(kwargs or {}))
    keep = ("nn_module_stack", "stack_trace", "torch_fn")
    new.meta = {key: like.meta[key] for key in keep if key in like.meta}
    values = fx.node.map_arg((new.args, new.kwargs), lambda n: n.meta["val"])
    mode = next(
        (
            v.fake_mode
            for n in nodes_in((new.args, new.kwargs))
            if hasattr(v := n.meta["val"], "fake_mode")
        ),
        None,
    )
    assert mode is not None and isinstance(values, tuple)
    with mode, torch.no_grad():
        new.meta["val"] = target(*values[0], **values[1])
    return new


# -- passes ---------------------------------------------------------------------------------------


def _is_region(node: fx.Node, word: str = "") -> bool:
    """Whether the node calls a subgraph, as ``torch.no_grad`` and ``torch.autocast`` make them."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name.startswith("wrap_with_") and word in name


def inline_no_grad(module: fx.GraphModule) -> fx.GraphModule:
    """``y = region(False, body, x)`` -> the body's nodes, with ``y`` detached."""
    for node in [n for n in module.graph.nodes if _is_region(n, "set_grad_enabled")]:
        enabled, body, *inputs = node.args
        assert isinstance(body, fx.Node) and isinstance(body.target, str)
        inner = module.get_submodule(body.target)
        assert isinstance(inner, fx.GraphModule)
        names = [n for n in inner.graph.nodes if n.op == "placeholder"]
        copied: dict[fx.Node, Any] = dict(zip(names, inputs, strict=True))
        for n in inner.graph.nodes:
            if n.op == "get_attr":
                raise CaptureError(
                    "a no_grad region holds constants of its own, which lrpfx cannot inline.",
                    where=[source_line(node)],
                    fix="compute the constant before the region.",
                )
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(inner.graph, copied)
            if not enabled:
                results = fx.node.map_arg(results, lambda n: _insert(n, aten.detach.default, (n,)))
        assert isinstance(results, (tuple, list))
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        if not body.users:
            module.graph.erase_node(body)
    return module


#: ops that are random in training mode, and the position of the argument that says so
_RANDOM = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.native_dropout.default: 2,
    aten.rrelu.default: 3,
    aten.scaled_dot_product_attention.default: 4,
}


def refuse_training(module: fx.GraphModule) -> fx.GraphModule:
    """Raise TrainingModeError if any op is random or shares statistics over the batch."""
    bad = []
    for node in module.graph.nodes:
        arguments = tuple(bound_arguments(node).values()) if _is_aten(node) else ()
        if node.target in _RANDOM and arguments[_RANDOM[node.target]]:
            bad.append((node, "is random"))
        elif node.target is aten.batch_norm.default and (arguments[5] or arguments[3] is None):
            bad.append((node, "uses the statistics of the batch"))
        elif _is_aten(node) and "native_batch_norm" in node.target._schema.name:
            if node.target is not aten._native_batch_norm_legit_no_training.default:
                bad.append((node, "uses the statistics of the batch"))
    if bad:
        raise TrainingModeError(
            "the model is in training mode: its output is random or depends on the other samples.",
            where=[
                f"{calls[-1].path if (calls := module_calls(n)) else '(the model)'}: "
                f"{n.target._schema.name.split('::')[-1]} {why}   {source_line(n)}".rstrip()
                for n, why in bad
            ],
            fix="call model.eval() first (batch norm needs running statistics).",
        )
    return module


def refuse_random(module: fx.GraphModule) -> fx.GraphModule:
    """Raise CaptureError if an output depends on random numbers.

    Comparing outputs is no safeguard: a seeded generator agrees on the first run only.
    """
    bad = [
        node
        for node in used_nodes(module.graph)
        if _is_aten(node)
        and torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]
        and node.target not in _RANDOM
    ]
    if bad:
        raise CaptureError(
            "the model draws random numbers in forward().",
            where=[f"{node.target}   {source_line(node)}" for node in bad],
            fix="draw them outside and pass them as an input or keep them as a buffer.",
        )
    return module


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def whole_batch_norm(module: fx.GraphModule) -> fx.GraphModule:
    """``getitem(_native_batch_norm_legit_no_training(x, ...), 0)`` -> ``batch_norm(x, ...)``."""
    native = aten._native_batch_norm_legit_no_training.default
    for node in [n for n in module.graph.nodes if n.target is native]:
        x, weight, bias, mean, var, momentum, eps = bound_arguments(node).values()
        with module.graph.inserting_before(node):
            args = (x, weight, bias, mean, var, False, momentum, eps, False)
            new = _insert(node, aten.batch_norm.default, args)
        for user in list(node.users):
            user.replace_all_uses_with(new)
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    return module


_IDENTITIES = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default}
_CASTS |= {aten.type_as.default, aten.to.other}


def drop_noops(module: fx.GraphModule) -> fx.GraphModule:
    """``y = dropout(x)`` -> ``x``; likewise clone, contiguous, casts to the same type; no asserts.

    Comes after ``refuse_training``: the dropouts left are those of evaluation mode.
    """
    for node in reversed(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _IDENTITIES or (node.target in _CASTS and _keeps_type(node)):
            node.replace_all_uses_with(nodes_in(node.args)[0])
            module.graph.erase_node(node)
        elif "assert" in str(node.target) and not node.users:
            module.graph.erase_node(node)
    return module


def _keeps_type(node: fx.Node) -> bool:
    before, after = nodes_in(node.args)[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device


def copies_to_casts(module: fx.GraphModule) -> fx.GraphModule:
    """``copy(a, b)`` -> ``b`` in the shape and dtype of ``a``, which is all that ``a`` gives it."""
    for node in [n for n in module.graph.nodes if n.target is aten.copy.default]:
        into, source = node.args[:2]
        with module.graph.inserting_before(node):
            new = _insert(node, aten.expand_as.default, (source, into))
            if new.meta["val"].dtype != node.meta["val"].dtype:
                new = _insert(node, aten.to.dtype, (new, node.meta["val"].dtype))
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    return module


def open_attention(module: fx.GraphModule) -> fx.GraphModule:
    """``sdpa(q, k, v)`` -> ``softmax(scale * q k' + mask) v``, for rules of its parts.

    The fused kernel has no second derivative, and its parts have different rules.
    """
    for node in [
        n for n in module.graph.nodes if n.target is aten.scaled_dot_product_attention.default
    ]:
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(_attention(node))
        module.graph.erase_node(node)
    return module


def _attention(node: fx.Node) -> fx.Node:
    a = bound_arguments(node)
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    query = q.meta["val"]

    def op(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return _insert(node, target, args, kwargs)

    if a["enable_gqa"]:
        times = query.shape[-3] // k.meta["val"].shape[-3]
        k, v = (op(aten.repeat_interleave.self_int, t, times, -3) for t in (k, v))
    scale = a["scale"] if a["scale"] is not None else query.shape[-1] ** -0.5
    scores = op(
        aten.mul.Tensor, op(aten.matmul.default, q, op(aten.transpose.int, k, -2, -1)), scale
    )
    if a["is_causal"]:
        mask = op(aten.tril.default, op(aten.ones_like.default, scores, dtype=torch.bool))
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        scores = op(aten.where.ScalarOther, mask, scores, float("-inf"))
    elif mask is not None:
        scores = op(aten.add.Tensor, scores, mask)
    return op(aten.matmul.default, op(aten.softmax.int, scores, -1), v)


_STATISTICS = {aten.var.correction, aten.var.dim, aten.var.default, aten.std.correction}
_STATISTICS |= {aten.std.dim, aten.std.default, aten.linalg_vector_norm.default}
_MEANS = {aten.mean.dim, aten.mean.default, aten.sum.dim_IntList}
_STEPS = {aten.add.Tensor, aten.clamp_min.default, aten.mul.Tensor, aten.div.Tensor}
_STEPS |= {aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default}
_STEPS |= {aten.pow.Tensor_Scalar, aten.expand.default, aten.expand_as.default, aten.to.dtype}


def hold_statistics(module: fx.GraphModule) -> fx.GraphModule:
    """Marks ``rsqrt(mean(x * x) + eps)`` and its like as constants, as in layer norm.

    So a norm written by hand, ``x * rsqrt(mean(x * x) + eps)``, is a constant factor on x. The
    graph computes as before, and derivatives of the relevance still run through the statistic.
    What is no factor in the end (a norm that is itself the output) stays live.
    """
    for node in module.graph.nodes:
        if _is_statistic(node) and _only_scales(node):
            node.meta[HELD] = "statistic of a normalisation"
    return module


def _is_statistic(node: fx.Node) -> bool:
    """Whether the node is a variance, a standard deviation, a norm, or a mean of squares."""
    if node.target in _STATISTICS:
        return True
    if node.target not in _MEANS:
        return False
    squared = node.all_input_nodes[0]
    if squared.target is aten.pow.Tensor_Scalar:
        return bool(squared.args[1] == 2)
    is_square = squared.target is aten.mul.Tensor and len(squared.all_input_nodes) == 1
    return is_square or squared.target is aten.square.default


def _only_scales(node: fx.Node) -> bool:
    """Whether the node's value, roots and constants aside, ends as a factor or divisor only."""
    for user in node.users:
        others = [n for n in user.all_input_nodes if n is not node and n.op != "get_attr"]
        if user.target in (aten.mul.Tensor, aten.div.Tensor) and others:
            continue
        if user.target not in _STEPS or not _only_scales(user):
            return False
    return bool(node.users)


def views_to_reshapes(module: fx.GraphModule) -> fx.GraphModule:
    """``view(x, s)`` -> ``reshape(x, s)``: out-of-place ops may lay memory out in another way."""
    for node in module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    return module


# -- batch norm folded by data flow ---------------------------------------------------------------

_CONVS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
_CONVS |= {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input}
_TRANSPOSED |= {aten.conv_transpose3d.input}
_AFFINE = _CONVS | _TRANSPOSED | {aten.linear.default}


def fold_batch_norm(module: fx.GraphModule) -> fx.GraphModule:
    """``bn(conv(x, W, b))`` -> ``conv(x, W', b')``, and ``conv(bn(x), W, b)`` where exact.

    W' and b' are computed in the graph from the live parameters, so nothing is copied and
    gradients reach the real weights. The unfolded conv stays as a dead node: its value is what
    ``layers=`` reports as that module's activation. Batch norm before zero padding is kept, as
    the padding would not be shifted with the rest.
    """
    for node in [n for n in module.graph.nodes if n.target is aten.batch_norm.default]:
        source = node.args[0]
        if source.target in _AFFINE and len(source.users) == 1 and _channels_match(source):
            _fold_back(node, source)
        elif len(node.users) == 1 and _takes_shift(user := next(iter(node.users)), node):
            _fold_ahead(node, user)
    return module


def _channels_match(node: fx.Node) -> bool:
    """Batch norm is over dimension 1, a linear layer's channels are the last dimension."""
    return node.target is not aten.linear.default or node.meta["val"].ndim == 2


def _takes_shift(node: fx.Node, bn: fx.Node) -> bool:
    """Whether the affine op ``node`` maps a per-channel shift of its input to a constant."""
    if node.target is aten.linear.default:
        return node.args[0] is bn and node.args[1] is not bn and node.meta["val"].ndim == 2
    if node.target not in _CONVS or node.args[0] is not bn or node.args[1] is bn:
        return False
    padding = bound_arguments(node)["padding"]
    return padding == "valid" or (padding != "same" and not any(padding))


def _scale_and_shift(bn: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Nodes for gamma / sqrt(var + eps) and beta - mean * that, both (C,)."""
    a = bound_arguments(bn)
    shifted = _insert(bn, aten.add.Tensor, (a["running_var"], a["eps"]))
    scale = _insert(bn, aten.rsqrt.default, (shifted,))
    if a["weight"] is not None:
        scale = _insert(bn, aten.mul.Tensor, (scale, a["weight"]))
    moved = _insert(bn, aten.mul.Tensor, (a["running_mean"], scale))
    if a["bias"] is not None:
        return scale, _insert(bn, aten.sub.Tensor, (a["bias"], moved))
    return scale, _insert(bn, aten.neg.default, (moved,))


def _fold_back(bn: fx.Node, affine: fx.Node) -> None:
    """bn(W x + b) = (scale W) x + (scale b + shift)."""
    arguments = bound_arguments(affine)
    weight: fx.Node = arguments["weight"]
    shape = tuple(weight.meta["val"].shape)
    with bn.graph.inserting_before(bn):
        scale, shift = _scale_and_shift(bn)
        if affine.target in _TRANSPOSED:  # (in, out / groups, ...), outputs ordered by group
            groups = arguments["groups"]
            by_group = (groups, shape[0] // groups, *shape[1:])
            per_output = (groups, 1, shape[1]) + (1,) * (len(shape) - 2)
            folded = _scaled(bn, weight, scale, by_group, per_output, shape)
        else:
            per_output = (shape[0],) + (1,) * (len(shape) - 1)
            folded = _scaled(bn, weight, scale, shape, per_output, shape)
        if arguments["bias"] is not None:
            scaled = _insert(bn, aten.mul.Tensor, (arguments["bias"], scale))
            shift = _insert(bn, aten.add.Tensor, (scaled, shift))
        arguments.update(weight=folded, bias=shift)
        new = _insert(affine, affine.target, tuple(arguments.values()))
    new.meta["folded_calls"] = module_calls(bn)
    new.meta["unfolded"] = affine
    bn.replace_all_uses_with(new)
    bn.graph.erase_node(bn)


def _fold_ahead(bn: fx.Node, affine: fx.Node) -> None:
    """W (scale x + shift) + b = (W scale) x + (W shift + b)."""
    arguments = bound_arguments(affine)
    weight: fx.Node = arguments["weight"]
    shape = tuple(weight.meta["val"].shape)  # (out, in / groups, ...)
    groups = arguments.get("groups", 1)
    by_group = (groups, shape[0] // groups, *shape[1:])
    per_input = (groups, 1, shape[1]) + (1,) * (len(shape) - 2)
    with bn.graph.inserting_before(affine):
        scale, shift = _scale_and_shift(bn)
        folded = _scaled(bn, weight, scale, by_group, per_input, shape)
        spread = _scaled(bn, weight, shift, by_group, per_input, shape)
        bias = _insert(bn, aten.sum.dim_IntList, (spread, list(range(1, len(shape)))))
        if arguments["bias"] is not None:
            bias = _insert(bn, aten.add.Tensor, (bias, arguments["bias"]))
        arguments.update(weight=folded, bias=bias)
        name = next(iter(arguments))
        arguments[name] = bn.args[0]
        new = _insert(affine, affine.target, tuple(arguments.values()))
    new.meta["folded_calls"] = module_calls(bn)
    affine.replace_all_uses_with(new)
    affine.graph.erase_node(affine)
    bn.graph.erase_node(bn)


def _scaled(
    like: fx.Node,
    weight: fx.Node,
    factor: fx.Node,
    weight_shape: Sequence[int],
    factor_shape: Sequence[int],
    shape: Sequence[int],
) -> fx.Node:
    """weight * factor, each viewed in its own shape, the product in ``shape``."""
    factor = _insert(like, aten.reshape.default, (factor, list(factor_shape)))
    if tuple(weight_shape) != tuple(shape):
        weight = _insert(like, aten.reshape.default, (weight, list(weight_shape)))
    product = _insert(like, aten.mul.Tensor, (weight, factor))
    if tuple(weight_shape) != tuple(shape):
        product = _insert(like, aten.reshape.default, (product, list(shape)))
    return product


#: In this order; each is ``GraphModule -> GraphModule`` and keeps what the graph computes.
PASSES: tuple[Pass, ...] = (
    inline_no_grad,
    refuse_training,
    whole_batch_norm,
    copies_to_casts,
    drop_noops,
    refuse_random,
    open_attention,
    hold_statistics,
    whole_activations,
    flat_products,
    views_to_reshapes,
    fold_batch_norm,
)
