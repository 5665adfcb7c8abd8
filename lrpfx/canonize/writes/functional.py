"""In-place ops, and regions of no_grad and autocast -> plain functional ops."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from lrpfx.canonize.insert import insert
from lrpfx.canonize.opened import RECURRENT, open_recurrent
from lrpfx.canonize.writes.memory import Memory, writes
from lrpfx.capture import AUTOCAST, Program, first_line, tracing
from lrpfx.errors import CaptureError
from lrpfx.ops import nodes_in, source_line

aten = torch.ops.aten


def functionalize(program: Program, module: fx.GraphModule) -> fx.GraphModule:
    """``y = relu_(x)`` -> ``y = relu(x)``; writes into views -> scatters; no vmap.

    Tensors that share memory are views of one another, each by an op. What is written into one is
    put into what it is a view of, and so on; others are viewed anew where they are read. Where a
    view is not known, PyTorch's functionalisation rewrites the whole graph, by a second trace.

    Args:
        program: The graph as it was captured.
        module: The same, ``unlifted``.
    """
    bodies = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
    nodes = [node for body in bodies for node in body.graph.nodes]
    regions = any(_is_region(node, "autocast") or _transforms(node) for node in nodes)
    inner = [body for body in bodies if body is not module]
    regions = regions or any(writes(node) for body in inner for node in body.graph.nodes)
    if not regions:
        for node in module.graph.nodes:
            if node.target is aten.detach_.default:  # as tensors that forward() makes have it
                node.target = aten.detach.default  # it changes no value
        memory = Memory(module.graph)
        if memory.known:
            memory.renew()
            return module
    _detach_regions(program.graph_module)
    _open_layers(program.graph_module)
    with tracing():
        try:
            program = program.run_decompositions({})
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


def _open_layers(module: fx.GraphModule) -> None:
    """Open recurrent layers in regions of autocast, of which it casts a whole layer or its steps.

    Which that is hangs on kernels, so that a layer is run on zeros and asked.
    """
    for outer in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        for region in [n for n in outer.graph.nodes if _is_region(n, "autocast")]:
            device, dtype, enabled, _, body = region.args[:5]
            inner = outer.get_submodule(body.target)
            assert isinstance(inner, fx.GraphModule)
            for node in [n for n in inner.graph.nodes if enabled and n.target in RECURRENT]:
                zeros = fx.node.map_arg((node.args, node.kwargs), _zeros)
                with torch.autocast(device, dtype), torch.no_grad():
                    found = node.target(*zeros[0], **zeros[1])
                if (found[0] if isinstance(found, tuple) else found).dtype == dtype:
                    with inner.graph.inserting_before(node):
                        node.args = fx.node.map_arg(node.args, functools.partial(_cast, dtype))
                else:
                    node.meta[AUTOCAST] = dtype
            if enabled:
                open_recurrent(inner).recompile()


def _zeros(node: fx.Node) -> Any:
    """As many as a node has, two where that is not known."""
    val = node.meta["val"]
    sizes = [size if isinstance(size, int) else 2 for size in val.shape]
    return torch.zeros(sizes, dtype=val.dtype, device=val.device)


def _cast(dtype: torch.dtype, node: fx.Node) -> fx.Node:
    same = node.meta["val"].dtype == dtype or not node.meta["val"].is_floating_point()
    return node if same else insert(node, aten.to.dtype, (node, dtype))


def unlifted(program: Program) -> fx.GraphModule:
    """The program as a module that holds the user's own parameters."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _is_region(node: fx.Node, word: str = "") -> bool:
    """Whether the node calls a subgraph, as ``torch.no_grad`` and ``torch.autocast`` make them."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name.startswith("wrap_with_") and word in name


def _transforms(node: fx.Node) -> bool:
    """Whether a node begins or ends a transform of torch.func, such as vmap."""
    return str(getattr(node.target, "__module__", "")).startswith("torch._functorch.")


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
            if isinstance(source, fx.Node):
                new = insert(node, aten.expand_as.default, (source, into))
            else:
                new = insert(node, aten.full_like.default, (into, source))
            if new.meta["val"].dtype != node.meta["val"].dtype:
                new = insert(node, aten.to.dtype, (new, node.meta["val"].dtype))
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    return module
