"""Named passes that bring every spelling of a network to one form, each verified on its own.

The graph that leaves here has no in-place ops, no regions, no no-ops, no fused attention, and no
batch norm where the algebra lets it be part of the affine op beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrpfx.canonize.final import leave_out_final
from lrpfx.canonize.folding import (
    fold_into_layers,
    hold_batch_statistics,
    is_of_batch,
    write_out_batch_norm,
)
from lrpfx.canonize.hold import hold_divisors, hold_statistics
from lrpfx.canonize.insert import insert
from lrpfx.canonize.measure import INPUTS
from lrpfx.canonize.opened import (
    group_heads,
    one_name_each,
    open_attention,
    open_compounds,
    open_parts,
    open_recurrent,
    open_statistics,
    pair_complex,
)
from lrpfx.canonize.softmaxes import (
    gates_of_two,
    join_exponentials,
    one_exponential_each,
    open_exponentials,
    products_with_parts,
    whole_entmax,
    whole_exponentials,
    whole_inverse_softmaxes,
    whole_softmaxes,
    whole_weights,
)
from lrpfx.canonize.whole import (
    factors_of_one_tensor,
    whole_activations,
    whole_functions,
    whole_gates,
    whole_inverses,
    whole_lerps,
    whole_quantisation,
    whole_relus,
    whole_sigmoids,
)
from lrpfx.canonize.writes import (
    copies_to_casts,
    functionalize,
    inline_no_grad,
    places_of_strides,
    reads_past_writes,
    unlifted,
    writes,
)
from lrpfx.capture import Program
from lrpfx.errors import CaptureError, TrainingModeError, counted
from lrpfx.ops import (
    HELD,
    bound_arguments,
    module_calls,
    nodes_in,
    source_line,
    used_nodes,
    verified,
)

aten = torch.ops.aten

Pass = Callable[[fx.GraphModule], fx.GraphModule]


def canonize(
    program: Program, explained: Collection[int] | None = None, by_batch: bool = False
) -> fx.GraphModule:
    """Run every pass of ``PASSES`` in order and verify the graph after each that changes it.

    Args:
        program: The graph as it was captured.
        explained: Which of the flat inputs may be explained, None for all.
        by_batch: Whether batch norm may use the statistics of the batch.

    Raises:
        TrainingModeError: The graph is random or mixes the batch.
        CaptureError: In-place ops that even PyTorch's own functionalisation leaves.
    """
    # While recurrent layers still tell of their dropout.
    module = functionalize(program, _refuse_training(unlifted(program), by_batch))
    seen = verified(module.graph, [])
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for i, node in enumerate(inputs):
        if explained is not None and i not in explained:
            node.meta[HELD] = "not explained"
    module.meta[INPUTS] = pytree.tree_leaves(program.example_inputs)
    for canonical in (hold_batch_statistics, *PASSES) if by_batch else PASSES:
        module = canonical(module)
        seen = verified(module.graph, seen)
    del module.meta[INPUTS]
    # Twins are put beside what an output depends on; a write that is left would be lost there.
    if left := [node for node in module.graph.nodes if writes(node)]:
        raise CaptureError(
            "in-place ops are left that other ops depend on.",
            where=[f"{node.target}   {source_line(node)}" for node in left],
            fix="write them without the in-place op.",
        )
    module.recompile()
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
#: Recurrent layers: random in training mode and with dropout; both follow the number of layers.
_RECURRENT = {
    getattr(getattr(aten, name), form)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for form in ("input", "data")
}


def refuse_training(module: fx.GraphModule) -> fx.GraphModule:
    """Raise TrainingModeError if any op is random or shares statistics over the batch.

    Weights that are standardised by a batch norm of their own do neither.
    """
    return _refuse_training(module, by_batch=False)


def _refuse_training(module: fx.GraphModule, by_batch: bool) -> fx.GraphModule:
    bad = []
    for node in filter(_is_aten, module.graph.nodes):
        arguments = tuple(bound_arguments(node).values())
        if node.target in _RANDOM and arguments[_RANDOM[node.target]] and not _drops_none(node):
            bad.append((node, "is random"))
        elif node.target in _RECURRENT and _has_dropout(node):
            bad.append((node, "is random"))
        elif not by_batch and is_of_batch(node):
            bad.append((node, "uses the statistics of the batch"))
    if bad and all(_without_statistics(node) for node, _ in bad):
        raise TrainingModeError(
            "the model's output depends on the other samples, in evaluation mode, too.",
            where=counted(_place(node, "has no running statistics") for node, _ in bad),
            fix="give batch norm running statistics (track_running_stats=True, and train the model "
            "or reset them); or normalise each sample by itself, by GroupNorm or InstanceNorm. "
            'lrpfx.Explainer(model, x, bn="batch") takes the statistics of the batch as constants.',
        )
    if bad:
        raise TrainingModeError(
            "the model is in training mode: its output is random or depends on the other samples.",
            where=counted(_place(node, why) for node, why in bad),
            fix="call model.eval() first, to explain it by running statistics; or train it as it "
            'is by lrpfx.Explainer(model, x, bn="batch"). If it stays so in evaluation mode, '
            "forward() calls an op without the module's mode: F.dropout needs "
            "training=self.training.",
        )
    return module


def _place(node: fx.Node, why: str) -> tuple[str, str, str]:
    calls = module_calls(node)
    path = calls[-1].path if calls else "(the model)"
    name = node.target._schema.name.split("::")[-1]  # type: ignore[union-attr]
    return f"{name} {why}", path, source_line(node)


def _without_statistics(node: fx.Node) -> bool:
    return node.target is aten.batch_norm.default and bound_arguments(node)["running_mean"] is None


def _drops_none(node: fx.Node) -> bool:
    """Whether it is dropout of nothing, as layers have whose probability is 0."""
    return bound_arguments(node).get("p") == 0


def _has_dropout(node: fx.Node) -> bool:
    arguments = bound_arguments(node)
    return bool(arguments["train"] and arguments["dropout"])


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
        and node.target not in _RECURRENT
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
            new = insert(node, aten.batch_norm.default, args)
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
    aten.alias_copy.default,
    aten.positive.default,
    aten.lift_fresh_copy.default,
}
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default}
_CASTS |= {aten.type_as.default, aten.to.other}


def drop_noops(module: fx.GraphModule) -> fx.GraphModule:
    """``y = dropout(x)`` -> ``x``; likewise clone, contiguous, casts to the same type; no asserts.

    So are slices of everything, and writes into these, whatever the batch size, ``0 + x`` as
    ``sum([x, y])`` has it, and ``1 * x``.

    Comes after ``refuse_training``: the dropouts left are those of evaluation mode.
    """
    for node in reversed(module.graph.nodes):
        if node.op != "call_function":
            continue
        if (
            node.target in _IDENTITIES
            or (node.target in _CASTS and _keeps_type(node))
            or (node.target is aten.slice.Tensor and _takes_all(node))
            or _changes_nothing(node)
        ):
            node.replace_all_uses_with(nodes_in(node.args)[0])
            module.graph.erase_node(node)
        elif node.target is aten.slice_scatter.default and _takes_all(node):
            node.replace_all_uses_with(bound_arguments(node)["src"])
            module.graph.erase_node(node)
        elif "assert" in str(node.target) and not node.users:
            module.graph.erase_node(node)
    return module


def _keeps_type(node: fx.Node) -> bool:
    before, after = nodes_in(node.args)[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device


def _takes_all(node: fx.Node) -> bool:
    """Whether a slice is all there is by its arguments; by shapes it may be so for some batches."""
    a = bound_arguments(node)
    size = nodes_in(node.args)[0].meta["val"].shape[a["dim"]]
    enough = size if isinstance(size, int) else torch.iinfo(torch.int64).max
    whole = a["end"] is None or (isinstance(a["end"], int) and a["end"] >= enough)
    return a["start"] in (None, 0) and a["step"] == 1 and whole


_NEUTRAL = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}


def _changes_nothing(node: fx.Node) -> bool:
    """Whether a number is added or multiplied with that changes neither values nor type."""
    if node.target not in _NEUTRAL or node.kwargs:
        return False
    number, x = node.args[1], node.args[0]
    same = isinstance(number, (int, float)) and number == _NEUTRAL[node.target]
    return same and isinstance(x, fx.Node) and x.meta["val"].dtype == node.meta["val"].dtype


def views_to_reshapes(module: fx.GraphModule) -> fx.GraphModule:
    """``view(x, s)`` -> ``reshape(x, s)``: out-of-place ops may lay memory out in another way."""
    for node in module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    return module


#: In this order; each is ``GraphModule -> GraphModule`` and keeps what the graph computes.
PASSES: tuple[Pass, ...] = (
    inline_no_grad,
    refuse_training,
    open_recurrent,
    whole_batch_norm,
    whole_quantisation,
    copies_to_casts,
    places_of_strides,
    open_compounds,
    drop_noops,
    refuse_random,
    one_name_each,
    open_parts,
    pair_complex,
    whole_entmax,
    views_to_reshapes,
    reads_past_writes,
    whole_relus,
    whole_functions,
    products_with_parts,
    open_exponentials,
    whole_inverse_softmaxes,
    whole_exponentials,
    one_exponential_each,
    join_exponentials,
    whole_softmaxes,
    whole_weights,
    gates_of_two,
    group_heads,
    open_attention,
    whole_inverses,
    hold_statistics,
    open_statistics,
    whole_lerps,
    whole_gates,
    factors_of_one_tensor,
    whole_activations,
    whole_sigmoids,
    hold_divisors,
    fold_into_layers,
    write_out_batch_norm,
    leave_out_final,
)
