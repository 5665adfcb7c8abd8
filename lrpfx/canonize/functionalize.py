"""In-place ops, and regions of no_grad and autocast -> plain functional ops."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from lrpfx.capture import Program, first_line, tracing
from lrpfx.errors import CaptureError
from lrpfx.ops import argument_names, bound_arguments, nodes_in, source_line

aten = torch.ops.aten


def functionalize(
    program: Program, module: fx.GraphModule, cast: Collection[Any]
) -> fx.GraphModule:
    """``y = relu_(x)`` -> ``y = relu(x)``; writes into views -> scatters.

    Renaming is exact where nothing reads the written storage later except through the in-place
    op's own result. Where something does, PyTorch's functionalisation rewrites the whole graph,
    at the cost of a second trace.

    Args:
        program: The graph as it was captured.
        module: The same, ``unlifted``.
        cast: Ops of which autocast casts the steps; where it does, PyTorch takes them apart.
    """
    bodies = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
    regions = any(_is_region(node, "autocast") for body in bodies for node in body.graph.nodes)
    targets = {node.target for body in bodies for node in body.graph.nodes}
    apart = targets.intersection(cast) if regions else set()
    inner = [body for body in bodies if body is not module]
    regions = regions or any(writes(node) for body in inner for node in body.graph.nodes)
    memories: dict[int | None, list[fx.Node]] = {}
    for node in module.graph.nodes:
        memories.setdefault(_storage(node), []).append(node)
    private = all(
        _is_private(node, memories[_storage(nodes_in(node.args)[0])])
        for node in module.graph.nodes
        if writes(node)
    )
    if private and not regions:
        for node in [n for n in module.graph.nodes if writes(n)]:
            _rename(node)
        return module
    _detach_regions(program.graph_module)
    with tracing():
        known = torch.export.default_decompositions()
        try:
            program = program.run_decompositions({op: known[op] for op in apart})
        except Exception as error:  # whatever the tracer raises
            raise CaptureError(
                "in-place ops or regions of autocast could not be taken apart: "
                f"{type(error).__name__}: {first_line(error)}",
                where=[source_line(n) for n in module.graph.nodes if writes(n)],
                fix="write the lines named without in-place ops, if there are any; or explain a "
                "wrapper module around the rest.",
            ) from error
        module = unlifted(program)
    for node in reversed([n for n in module.graph.nodes if writes(n)]):
        if nodes_in(node.args)[0].op not in ("placeholder", "get_attr") or node.users:
            raise CaptureError(
                f"{node.target} writes into memory that other ops read, and could not be undone.",
                where=[source_line(node)],
                fix="write it without the in-place op.",
            )
        # What is left are write-backs to the user's inputs and buffers, which stay as they are.
        module.graph.erase_node(node)
    return module


def _detach_regions(module: fx.GraphModule) -> None:
    """Detach what leaves a region of no_grad: PyTorch's functionalisation forgets its bounds."""
    bodies = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
    for outer in bodies:
        for node in outer.graph.nodes:
            if not _is_region(node, "set_grad_enabled") or node.args[0]:
                continue
            body = outer.get_submodule(node.args[1].target)
            assert isinstance(body, fx.GraphModule)
            output = next(iter(reversed(body.graph.nodes)))
            with body.graph.inserting_before(output):
                output.args = fx.node.map_arg(
                    output.args, lambda n: insert(n, aten.detach.default, (n,))
                )
            body.recompile()


def unlifted(program: Program) -> fx.GraphModule:
    """The program as a module that holds the user's own parameters."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def writes(node: fx.Node) -> bool:
    """Whether the op changes memory that it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """``relu_.default`` -> ``relu.default``, which takes the same arguments; None without such.

    The overload's name tells nothing: ``pow_.Scalar`` is ``pow.Tensor_Scalar``.
    """
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    given = _arguments(target._schema)
    for overload in packet.overloads() if packet is not None and given else ():
        other = getattr(packet, overload)
        if _arguments(other._schema) == given and not other._schema.is_mutable:
            found: torch._ops.OpOverload = other
            return found
    return None


def _arguments(schema: Any) -> dict[str, str]:
    """Type of each, in any order; what is written is ``self`` or ``input``. Empty for lists."""
    named = {"self" if a.name == "input" else a.name: str(a.type) for a in schema.arguments}
    return named if "Tensor" in map(str, (r.type for r in schema.returns)) else {}


def _is_private(node: fx.Node, same_memory: Sequence[fx.Node]) -> bool:
    """Whether the written memory is read later through the node's own result only.

    The fake tensors of a trace share storage exactly where the real ones do.
    """
    if _storage(same_memory[0]) is None or functional(node.target) is None:  # type: ignore[arg-type]
        return False
    before = itertools.takewhile(lambda other: other < node, same_memory)
    return not any(user is not node and node < user for other in before for user in other.users)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _rename(node: fx.Node) -> None:
    value: Tensor = node.meta["val"]
    op = functional(node.target)  # type: ignore[arg-type]
    assert op is not None
    names = argument_names(op)
    if names == argument_names(node.target) or names[0] == "input":
        args, kwargs = node.args, node.kwargs
    else:  # polygamma has its tensor last
        args, kwargs = (), bound_arguments(node)
    with node.graph.inserting_before(node):
        new = insert(node, op, args, kwargs)
        if new.meta["val"].dtype != value.dtype:  # in-place ops keep their dtype
            new = insert(node, aten.to.dtype, (new, value.dtype))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def insert(
    like: fx.Node, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """A call at the graph's insert point, with the provenance of ``like`` and its own value."""
    new = like.graph.call_function(target, tuple(args), dict(kwargs or {}))
    keep = ("nn_module_stack", "stack_trace", "torch_fn")
    new.meta = {key: like.meta[key] for key in keep if key in like.meta}
    values = fx.node.map_arg((new.args, new.kwargs), lambda n: n.meta["val"])
    given = pytree.tree_leaves([n.meta["val"] for n in nodes_in((new.args, new.kwargs))])
    mode = next((v.fake_mode for v in given if hasattr(v, "fake_mode")), None)
    assert mode is not None and isinstance(values, tuple)
    with mode, enable_python_dispatcher(), torch.no_grad():
        new.meta["val"] = target(*values[0], **values[1])
    return new


def copied(node: fx.Node, other: Mapping[fx.Node, fx.Node], like: fx.Node) -> fx.Node:
    """A node's call with others in the place of some of its inputs, as ``insert`` makes it."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: other.get(n, n))
    return insert(like, node.target, args, kwargs)


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
                results = fx.node.map_arg(results, lambda n: insert(n, aten.detach.default, (n,)))
        assert isinstance(results, (tuple, list))
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        if not body.users:
            module.graph.erase_node(body)
    return module


def copies_to_casts(module: fx.GraphModule) -> fx.GraphModule:
    """``copy(a, b)`` -> ``b`` in the shape and dtype of ``a``, which is all that ``a`` gives it."""
    for node in [n for n in module.graph.nodes if n.target is aten.copy.default]:
        into, source = node.args[:2]
        with module.graph.inserting_before(node):
            new = insert(node, aten.expand_as.default, (source, into))
            if new.meta["val"].dtype != node.meta["val"].dtype:
                new = insert(node, aten.to.dtype, (new, node.meta["val"].dtype))
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    return module
