"""An Explainer and example inputs -> one program that computes output and relevance.

The fast graph and the pull of its phantoms are run once on tensors without values, and every op
that they come to is written down: nothing of it needs autograd, the library or Python. Backward
ops are written as the forward ops that they are equal to, which other runtimes have, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from lrpfx.capture import (
    Inputs,
    Signature,
    argument_names,
    check_inputs,
    dotted_names,
    first_line,
    tracing,
)
from lrpfx.deploy.equivalents import TABLE
from lrpfx.deploy.seeds import first_finite, scaled_in_graph, seed_in_graph
from lrpfx.deploy.watch import Watch, Watched
from lrpfx.errors import ExportError
from lrpfx.explain import Explainer
from lrpfx.ops import record
from lrpfx.run import SIZES, Run, Seed, Spelled, in_float16, tidy

#: Names of the sizes of one tensor that may vary, by dimension.
Letters = Mapping[int, str]


@dataclass(frozen=True)
class Program:
    """What computes output and relevance.

    Args:
        exported: As torch.export has it: of the model's inputs, then of the target if it is one.
        inputs: Names of the tensors that it takes, flat.
        outputs: Names of the tensors that it returns, flat.
        letters: Per tensor that it takes, names of the sizes that may vary.
        origins: By op, where in the model it comes from.
    """

    exported: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    letters: tuple[Letters, ...]
    origins: Mapping[Any, Collection[str]]

    def places(self, ops: Collection[Any]) -> list[str]:
        """Each of the ops, at each of its places."""
        return [f"{op}: {at}" for op in ops for at in self.origins.get(op) or ["a rule"]]


def make_program(explainer: Explainer, inputs: Inputs, by_input: bool) -> Program:
    """Write an explanation down.

    Args:
        explainer: What explains.
        inputs: Example inputs.
        by_input: Whether the target is an input; else the strongest output is explained.
    """
    signature, model = explainer._engine.captured.signature, explainer.model
    leaves = check_inputs(signature, inputs)
    letters = letters_of(signature)
    leaves = [_doubled(leaf, each) for leaf, each in zip(leaves, letters, strict=True)]
    args, kwargs = pytree.tree_unflatten(leaves, signature.spec)
    ordered = kwargs or args  # as they were captured
    if isinstance(inputs, Tensor):
        (ordered,) = args
    arguments, names = argument_names(model, ordered), dotted_names(model, ordered)
    if by_input:
        target, name = _example_target(leaves, letters), target_name(arguments)
        args, kwargs = with_target(args, kwargs, target, name)
        leaves, letters = [*leaves, target], [*letters, {0: "N"} if any(letters) else {}]
        arguments, names = [*arguments, name], [*names, name]
    watch = Watch()
    with tracing(), _refusing(watch):
        graph, returned = _written_down(explainer, leaves, letters, ordered, by_input, watch)
        watch.place = ""
        structures = pytree.tree_structure((args, kwargs)), pytree.tree_structure(returned)
        graph.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(arguments, *structures)))
        graph.recompile()
        shapes = _shapes(args, kwargs, arguments, letters)
        exported = torch.export.export(graph, args, kwargs, dynamic_shapes=shapes, strict=False)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return Program(
        exported,
        tuple(names[i] for i in tensors),
        tuple(_output_names(returned, names)),
        tuple(letters[i] for i in tensors),
        watch.places,
    )


@contextlib.contextmanager
def _refusing(watch: Watch) -> Iterator[None]:
    """Tracers may raise anything: what they say, and the node that they were at."""
    try:
        yield
    except Exception as error:  # the Explainer itself has been run on the inputs by now
        raise ExportError(
            "the explanation cannot be written down for all values and sizes: "
            f"{type(error).__name__}: {first_line(error)}",
            where=[watch.place] if watch.place else [],
            fix="give the module there another rule, or write its lines so that nothing in them "
            "depends on values.",
        ) from error


# -- what is called how


def letters_of(signature: Signature) -> list[Letters]:
    """Per leaf of the inputs, names of the sizes that may vary."""
    shapes = [getattr(form, "shape", ()) for form in signature.leaves]
    return [{d: size for d, size in enumerate(s) if isinstance(size, str)} for s in shapes]


def target_name(arguments: Sequence[str]) -> str:
    """What the target is called: an argument of the model's own may be called so."""
    name = "target"
    while name in arguments:
        name += "_"
    return name


def with_target(
    args: tuple[Any, ...], kwargs: dict[str, Any], target: Tensor, name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, and the target as the last of them."""
    return (args, {**kwargs, name: target}) if kwargs else ((*args, target), kwargs)


def _output_names(returned: Any, inputs: Sequence[str]) -> list[str]:
    """Such as "output", "relevance"; or "output.logits", "relevance.pixels" where there are more.

    Args:
        returned: Output and relevance, of which the leaves that are tensors count.
        inputs: Names of the flat inputs.
    """
    output, relevance = returned
    keyed, _ = pytree.tree_flatten_with_path(output)
    names = [
        ".".join(("output", *(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)))
        for path, leaf in keyed
        if isinstance(leaf, Tensor)
    ]
    leaves = zip(inputs, pytree.tree_leaves(relevance), strict=False)
    explained = [name for name, r in leaves if isinstance(r, Tensor)]
    return names + [f"relevance.{n}" if len(explained) > 1 else "relevance" for n in explained]


# -- example inputs


def _doubled(leaf: Any, letters: Letters) -> Any:
    """A single sample twice: traced with one, a graph is one for one."""
    batched = letters.get(0) == "N"
    return torch.cat([leaf, leaf]) if batched and len(leaf) == 1 else leaf


def _example_target(leaves: Sequence[Any], letters: Sequence[Letters]) -> Tensor:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    given = zip(leaves, letters, strict=True)
    batch = next((t for t, each in given if each.get(0) == "N"), tensors[0])
    return torch.zeros(len(batch), dtype=torch.int64, device=batch.device)


def _shapes(
    args: Any, kwargs: Any, arguments: Sequence[str], letters: Sequence[Letters]
) -> dict[str, Any]:
    """What torch.export is told of the sizes, by argument."""
    batch, dims = Dim("N", min=1), iter(letters)

    def told(leaf: Any) -> Any:
        each = next(dims)
        return {d: batch if name == "N" else Dim.AUTO for d, name in each.items()} or None

    found = pytree.tree_map(told, [*args, *kwargs.values()])
    return dict(zip(arguments, found, strict=True))


# -- the graph


def _written_down(
    explainer: Explainer,
    leaves: Sequence[Any],
    letters: Sequence[Letters],
    inputs: Inputs,
    by_input: bool,
    watch: Watch,
) -> tuple[fx.GraphModule, Any]:
    """All ops of an explanation as a graph of the flat inputs, and what it returned."""
    gather, module = explainer._engine.gather, explainer._engine.graphs.for_export()
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    made: list[Any] = []
    halves = in_float16(explainer._engine.plan, leaves)
    records = {
        r.name: r for n in explainer._engine.module.graph.nodes if (r := record(n)) is not None
    }
    watched = Watched(module, records, watch)

    def explain(*tensors: Tensor) -> list[Any]:
        values, flat = dict(zip(state, tensors, strict=False)), list(leaves)
        for i, tensor in zip(places, tensors[len(state) :], strict=True):
            flat[i] = tensor
        _same_sizes(flat, letters)
        target = flat.pop() if by_input else None
        with Spelled(), watch:
            run = Run(*watched.run_with(values, [*flat, None]))
            seed = seed_in_graph(run.explained, target)
            starts = _pulled_scaled(run, seed) if halves else next(run.pull([seed])).starts
        found, _ = gather.by_input(flat, starts)
        made.append((plain(gather.output(run.clean)), plain(gather.structured(found, inputs))))
        return pytree.tree_leaves(made[0])

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    given: list[Tensor] = [mode.from_tensor(t, static_shapes=True) for t in state.values()]
    given += [_without_values(mode, leaves[i], letters[i]) for i in places]
    # Of ops in C++ that read sizes as numbers, the dispatcher in Python has others.
    with mode, enable_python_dispatcher(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        graph = make_fx(explain, decomposition_table=TABLE)(*given)
    tidy(graph)
    return _with_state(graph, state, places, len(leaves)), made[0]


def _pulled_scaled(run: Run, seed: Seed) -> list[Tensor | None]:
    """Relevance through float16, see ``run.pull_scaled``; of each size that may be needed."""
    scaled = [scaled_in_graph(run.explained, seed, size) for size in SIZES]
    pulled = run.pull([seed for seed, _ in scaled])
    return first_finite(
        [
            [None if r is None else r.float() / unit for r in each.starts]
            for each, (_, unit) in zip(pulled, scaled, strict=True)
        ]
    )


def _same_sizes(leaves: Sequence[Any], letters: Sequence[Letters]) -> None:
    """Let sizes of one name be one size."""
    first: dict[str, Any] = {}
    for leaf, each in zip(leaves, letters, strict=True):
        for dim, name in each.items():
            torch._check(leaf.shape[dim] == first.setdefault(name, leaf.shape[dim]))


def _without_values(mode: FakeTensorMode, tensor: Tensor, letters: Letters) -> Tensor:
    sizes = [
        DimDynamic.DYNAMIC if dim in letters else DimDynamic.STATIC for dim in range(tensor.ndim)
    ]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(tensor.detach(), symbolic_context=context)


def _with_state(
    graph: fx.GraphModule, state: Mapping[str, Tensor], places: Sequence[int], number: int
) -> fx.GraphModule:
    """The graph with parameters and buffers as its own, under the model's names for them.

    Args:
        graph: Takes the state, and the tensors among the inputs.
        state: The state.
        places: Which of the flat inputs the tensors are.
        number: How many inputs there are; what is no tensor is not read.
    """
    arguments = [n for n in graph.graph.nodes if n.op == "placeholder"]
    body = arguments[-1].next
    values: dict[str, Any] = {}
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        name = f"constant_{len(values)}"
        values[name], node.target = getattr(graph, node.target), name
    for node, (name, value) in zip(arguments, state.items(), strict=False):
        if node.users:
            with graph.graph.inserting_before(body):
                node.replace_all_uses_with(graph.graph.get_attr(name))
            values[name] = value.detach()
        graph.graph.erase_node(node)
    tensors = iter(arguments[len(state) :])
    for i in range(number):
        if i in places:
            body.prepend(next(tensors))
        else:
            with graph.graph.inserting_before(body):
                graph.graph.placeholder(f"constant_input_{i}")
    return fx.GraphModule(values, graph.graph)


def plain(value: Any) -> Any:
    """The same tensors in dicts and tuples, which need no library to be loaded again."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        return value
    return tuple(map(plain, pytree.tree_leaves(value)))
