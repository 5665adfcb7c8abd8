"""What forward() asks of tensors while it is traced, and torch.export does not answer.

Values of tensors that depend on no input are known: a branch on them is taken as in the model.
``.data`` is ``.detach()``; what is computed in inference mode is detached.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from lrpfx.capture.state import state_of
from lrpfx.ops import SHAPE_ONLY, SHAPED, nodes_in

#: What gives Python the values of tensors.
_READS = {"__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist"}
_READS |= {"is_nonzero", "equal", "allclose", "numpy"}


class Answers(TorchFunctionMode):
    """Answers what a model asks for while it is traced.

    Args:
        model: The model, with its own tensors in it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._state = model, state_of(model)
        self._values: _Values | None = None
        self._set: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def read(self) -> dict[str, Tensor]:
        """Copies of the parameters and buffers whose values have been asked for."""
        names = set() if self._values is None else self._values.read
        return {name: self._state[name].detach().clone() for name in sorted(names)}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one call of PyTorch, or answer it."""
        tracing = get_proxy_mode()
        kwargs = dict(kwargs or {})
        if tracing is None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if getattr(func, "__self__", None) is Tensor.data:
            if name == "__get__":
                return self._now(args[0]).detach()
            tensor, value = args
            # Autograd does not see the assignment: gradients reach the tensor as they did.
            through = tensor - tensor.detach() if tensor.requires_grad else 0.0
            self._set[id(tensor)] = tensor, self._now(value).detach() + through
            return None
        if self._set:
            args, kwargs = pytree.tree_map_only(Tensor, self._now, (args, kwargs))
        if name in _READS:
            known = self._known(tracing.tracer, (args, kwargs))
            if known is not None:
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    return func(*known[0], **known[1])
        found = func(*args, **kwargs)
        # Of these torch.export keeps no region.
        cut = torch.is_inference_mode_enabled() or (
            not torch.is_grad_enabled() and _in_autocast(tracing.tracer.graph)
        )
        return pytree.tree_map_only(Tensor, Tensor.detach, found) if cut else found

    def _now(self, tensor: Tensor) -> Tensor:
        """The tensor, or what its ``.data`` has been set to."""
        return self._set[id(tensor)][1] if id(tensor) in self._set else tensor

    def _known(self, tracer: Any, given: Any) -> Any:
        """The arguments with values for tensors; None if there is one that depends on an input."""
        if self._values is None:
            self._values = _Values(tracer, self._model, self._state)
        self._values.follow()
        leaves, spec = pytree.tree_flatten(given)
        found = [self._values.of(t) if isinstance(t, Tensor) else t for t in leaves]
        pairs = zip(leaves, found, strict=True)
        if any(isinstance(t, Tensor) and value is None for t, value in pairs):
            return None
        return pytree.tree_unflatten(found, spec)


def _in_autocast(graph: fx.Graph) -> bool:
    """Whether a region of autocast, enabled or not, has been entered and not been left."""
    entered = sum(n.target is torch.amp.autocast_mode._enter_autocast for n in graph.nodes)
    return entered > sum(n.target is torch.amp.autocast_mode._exit_autocast for n in graph.nodes)


class _Values:
    """The values of those nodes of a growing graph that depend on no input.

    Args:
        tracer: What writes the graph.
        model: The model, with the tracer's tensors in it.
        state: The model's own tensors by name.
    """

    def __init__(self, tracer: Any, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        self._tracer, self._followed = tracer, 0
        self._held: set[int | None] = set()
        self._known: dict[fx.Node, Any] = {}
        self._from: dict[fx.Node, frozenset[str]] = {}
        self.read: set[str] = set()
        for name, traced in state_of(model).items():
            node = self._node(traced)
            if node is not None:
                self._known[node], self._from[node] = state[name], frozenset([name])
                self._held.add(_storage(state[name]))

    def _node(self, tensor: Tensor) -> fx.Node | None:
        slot: Any = get_proxy_slot(tensor, self._tracer, None)
        return None if slot is None else slot.proxy.node

    def of(self, tensor: Tensor) -> Tensor | None:
        """The value of a traced tensor, None if it is not known."""
        node = self._node(tensor)
        if node is None:
            return None if isinstance(tensor, FakeTensor) else tensor
        self.read |= self._from.get(node, frozenset()) if node in self._known else set()
        return self._known.get(node)

    def follow(self) -> None:
        """Compute what has been written into the graph since the last time."""
        nodes = list(self._tracer.graph.nodes)[self._followed :]
        self._followed += len(nodes)
        with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
            for node in nodes:
                self._compute(node)

    def _compute(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            value = getattr(self._tracer.root, str(node.target), None)
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                self._known[node] = value
                self._held.add(_storage(value))
            return
        target = node.target
        if node.op != "call_function" or node in self._known:
            return
        is_op = isinstance(target, torch._ops.OpOverload)
        if not is_op and target is not operator.getitem:
            return
        given = nodes_in((node.args, node.kwargs))
        writes = is_op and target._schema.is_mutable  # type: ignore[union-attr]
        if writes and not self._may_write(given):
            self._forget(given[0])
            return
        random = is_op and torch.Tag.nondeterministic_seeded in target.tags  # type: ignore[union-attr]
        if random:
            return
        stand_ins = target in SHAPE_ONLY or target in SHAPED
        values = {n: self._known[n] if n in self._known else _empty(n, stand_ins) for n in given}
        if any(value is None for value in values.values()):
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        self._known[node] = target(*args, **kwargs)  # type: ignore[operator]
        sources = (self._from.get(n, frozenset()) for n in given)
        self._from[node] = frozenset[str]().union(*sources)
        if writes:
            self._from[given[0]] = self._from[node]

    def _may_write(self, given: list[fx.Node]) -> bool:
        """Whether all is known that an op writes, and where: not into the model's own tensors."""
        known = all(n in self._known for n in given)
        return known and _storage(self._known[given[0]]) not in self._held

    def _forget(self, node: fx.Node) -> None:
        """Forget what shares the memory of a node that is written into."""
        if node in self._known:
            storage = _storage(self._known[node])
            for other in [n for n, v in self._known.items() if _storage(v) == storage]:
                del self._known[other]


def _storage(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _empty(node: fx.Node, allowed: bool) -> Tensor | None:
    """Something of the form of a node that is not known, for ops that read no values."""
    form = node.meta.get("val")
    if not allowed or not isinstance(form, Tensor):
        return None
    if not all(isinstance(size, int) for size in form.shape):
        return None
    return torch.empty((), dtype=form.dtype, device=form.device).expand(form.shape)
