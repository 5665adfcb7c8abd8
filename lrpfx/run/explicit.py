"""Instrumented graph -> two plain graphs, forward and backward.

The instrumented graph and the pull of its phantoms are run once, and every op that they come to
is written down, those of the rules included. What the outputs are computed from is the forward
graph; what else the relevance is computed from, the backward graph. Neither needs autograd, so
that compilers take them whole.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from lrpfx.ops import nodes_in, reachable
from lrpfx.rewrite import freeze, written
from lrpfx.run.backward import Pulled, Run
from lrpfx.run.spelled import Spelled
from lrpfx.run.targets import Seed

aten = torch.ops.aten
#: Makes of a graph what is called in its place.
Compiler = Callable[[fx.GraphModule], Callable[..., Any]]


class Explicit:
    """Forward and backward graph for inputs of one form and seeds on given outputs.

    Args:
        module: An instrumented graph in its fast form, which nothing else runs.
        leaves: Flat inputs of the form.
        seed: A seed on these outputs.
        frozen: Whether the parameters stay as they are.
        compiler: What the two graphs are compiled by.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        leaves: Sequence[Any],
        seed: Seed,
        frozen: bool,
        compiler: Compiler,
    ) -> None:
        self.module, self._frozen = module, frozen
        self._devices = {leaf.device.type for leaf in _tensors(leaves)}
        self.reload()
        graph, structure = _written_down(module, self._state, leaves, seed)
        if frozen:
            graph = _frozen(graph, self._state)
        arguments = [n for n in graph.graph.nodes if n.op == "placeholder"]
        output = next(n for n in reversed(graph.graph.nodes) if n.op == "output")
        outputs, relevance = pytree.tree_unflatten(output.args[0], structure)
        begun = len(_tensors(seed.seeds))
        given, seeds = arguments[:-begun], arguments[-begun:]
        early = {*reachable(nodes_in(outputs)), *given}
        # Of an op that the forward graph runs, the backward graph may read another output.
        picks = [n for n in graph.graph.nodes if n.target is operator.getitem]
        early.update(n for n in picks if n.args[0] in early)
        read = reachable(nodes_in(relevance), lambda n: [] if n in early else n.all_input_nodes)
        saved = [n for n in graph.graph.nodes if n in read & early and n.op == "call_function"]
        self._forward = _Part(graph, given, (outputs, saved), compiler)
        self._backward = _Part(graph, [*given, *saved, *seeds], relevance, compiler)

    def reload(self) -> None:
        """Take the parameters and buffers that the module holds now."""
        self._state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def run(self, leaves: Sequence[Any]) -> ExplicitRun:
        """Run the forward graph; what it returns pulls seeds back."""
        given = [*([] if self._frozen else self._state.values()), *_tensors(leaves)]
        (clean, explained, activations), saved = self._call(self._forward, given)
        return ExplicitRun(self, clean, explained, activations, [*given, *saved])

    def pull(self, values: Sequence[Tensor], seed: Seed) -> Pulled:
        """Run the backward graph.

        Args:
            values: What the forward graph was given, and what it saved.
            seed: On the same outputs as the one that the graphs were made for.
        """
        starts, taps = self._call(self._backward, [*values, *_tensors(seed.seeds)])
        return Pulled(starts, taps, taps)

    def _call(self, part: _Part, values: Sequence[Tensor]) -> Any:
        with contextlib.ExitStack() as plainly:
            plainly.enter_context(torch.no_grad())
            for device in self._devices:  # the casts of autocast are in the graph
                plainly.enter_context(torch.autocast(device, enabled=False))
            return part(values)


@dataclass(frozen=True)
class ExplicitRun:
    """A forward pass by an explicit graph; see ``backward.Run``."""

    explicit: Explicit
    clean: list[Any]
    explained: list[Any]
    activations: list[Tensor]
    values: Sequence[Tensor]

    def pull(self, seeds: Sequence[Seed]) -> Iterator[Pulled]:
        """Pull the seeds back to the starts, one after the other."""
        return (self.explicit.pull(self.values, seed) for seed in seeds)


class _Part:
    """The part of a graph that computes ``ends`` from ``given``.

    Args:
        source: The graph.
        given: Nodes whose values it is called with.
        ends: Nodes, in any structure.
        compiler: What the two graphs are compiled by.
    """

    def __init__(
        self,
        source: fx.GraphModule,
        given: Sequence[fx.Node],
        ends: Any,
        compiler: Compiler,
    ) -> None:
        known = set(given)
        used = reachable(nodes_in(ends), lambda n: [] if n in known else n.all_input_nodes)
        self._reads = [i for i, node in enumerate(given) if node in used]
        graph = fx.Graph()
        copied = {given[i]: graph.placeholder(given[i].name) for i in self._reads}
        for node in source.graph.nodes:
            if node in used and node not in copied:
                copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output(fx.node.map_arg(ends, copied.__getitem__))
        self._run = compiler(fx.GraphModule(source, graph))

    def __call__(self, values: Sequence[Tensor]) -> Any:
        """The values of the ends."""
        return self._run(*(values[i] for i in self._reads))


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _written_down(
    module: fx.GraphModule, state: Mapping[str, Tensor], leaves: Sequence[Any], seed: Seed
) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    """All ops of one explanation as one graph, and the structure of what it returns.

    It takes the state, the tensors among the inputs, and the seeds, and returns clean outputs,
    explained ones and activations; relevance at starts and taps.
    """
    values, spec = pytree.tree_flatten((dict(state), list(leaves), seed.seeds))
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    structure: list[pytree.TreeSpec] = []

    def explain(*tensors: Tensor) -> list[Any]:
        flat = list(values)
        for i, tensor in zip(places, tensors, strict=True):
            flat[i] = tensor
        state, inputs, seeds = pytree.tree_unflatten(flat, spec)
        with Spelled():
            run = Run(*torch.func.functional_call(module, state, (*inputs, None)))
            (pulled,) = run.pull([replace(seed, seeds=seeds)])
        outputs = list(run.clean), list(run.explained), run.activations
        ends, spec_of_ends = pytree.tree_flatten((outputs, (pulled.starts, pulled.taps)))
        structure.append(spec_of_ends)
        return ends

    # One mode for what is noted of all values: else PyTorch makes one for each, with its stack.
    noted = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with torch.no_grad(), tracing(noted):
        graph = make_fx(explain)(*(values[i] for i in places))
    graph.graph.set_codegen(fx.graph.CodeGen())
    tidy(graph)
    return graph, structure[0]


def tidy(graph: fx.GraphModule) -> None:
    """Take out of a graph that was written down what belongs to this one call only.

    Raises:
        NotImplementedError: A rule writes into part of a tensor.
    """
    for node in graph.graph.nodes:
        if node.target is aten.detach.default:  # without autograd it is the tensor itself
            node.replace_all_uses_with(node.args[0])
        # Written down is what reshape came to with the strides of this call; compilers may have
        # others on the way.
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        if written(node) and not node.users:
            raise NotImplementedError(
                f"a rule writes by {node.target} into part of a tensor, which is not followed here"
            )
    graph.graph.eliminate_dead_code()


def _frozen(graph: fx.GraphModule, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph with the state as attributes, and what depends on these only computed once."""
    arguments = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for i, value in enumerate(state.values()):
        graph.register_buffer(f"state_{i}", value, persistent=False)
        with graph.graph.inserting_after(arguments[-1]):
            arguments[i].replace_all_uses_with(graph.graph.get_attr(f"state_{i}"))
        graph.graph.erase_node(arguments[i])
    return freeze(graph)
