"""A run of a model -> the fx graph of the ATen ops that it called, on the tensors it had."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.node import map_aggregate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lrpfx.capture.lines import called_at, source_of
from lrpfx.capture.reads import HOW, MASKED, Read, is_mask, takes_values
from lrpfx.capture.state import state_of
from lrpfx.errors import CaptureError
from lrpfx.ops import LIFTED, downstream

aten = torch.ops.aten
#: The key in ``node.meta``, of an op whose result autocast leaves as it is: what it casts to.
AUTOCAST = "autocast"


class _Form(NamedTuple):
    """Where in memory a tensor has its values, and of which kind."""

    memory: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Recorder(ProxyTorchDispatchMode):
    """Writes down each call of an op, whole as the model made it, before autograd sees it.

    A proxy mode is what PyTorch lets stand at this place of its dispatcher; proxies there are none.

    Args:
        model: The model. Its parameters and buffers become attributes of the graph, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        # Not by the parent, which imports a compiler to ask for its settings.
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY
        self.pre_dispatch, self.enter_stack = True, []
        self.graph = fx.Graph()
        self.attributes: dict[str, Tensor] = {}
        self._reads: list[tuple[fx.Node, str, str, bool]] = []
        #: Constants of which no op and no number is known that made them, with the line.
        self.strange: dict[str, tuple[fx.Node, str]] = {}
        #: Those of them that hang on the inputs.
        self._changing: set[fx.Node] = set()
        #: The memories of what was made of numbers in the run.
        self._of_numbers: dict[int, StorageWeakRef] = {}
        #: The op that is running, None between ops.
        self.running: fx.Node | None = None
        #: Whether what is called now belongs to the recorder, and not to the model.
        self.busy = False
        #: Whether the model lets gradients pass, as it said last; see ``passes``.
        self.graded = True
        self._state = state_of(model)
        self._names: dict[int, str] = {}
        for name, tensor in self._state.items():
            self._names.setdefault(id(tensor), name)
        self._nodes = WeakTensorKeyDictionary()
        self._cut: dict[fx.Node, fx.Node | None] = {}
        self._stack: list[tuple[str, tuple[str, str]]] = [("", ("", _type_name(model)))]
        self._memories: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at: dict[_Form, fx.Node] = {}
        #: The memories that were made in the run or are the inputs', or that it has written into.
        self._own: set[int] = set()
        self._devices: set[torch.device] = set()

    @property
    def passes(self) -> bool:
        """Whether gradients pass here: not under no_grad, nor in inference mode."""
        return self.graded and not torch.is_inference_mode_enabled()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # for that it would be imported

    # -- what is written down ---------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # A constant that was made for this call is seen when it is used; nobody else has it.
        if self.busy or func is aten.lift_fresh.default:
            if not self.busy:
                self.of_numbers(args[0])
            return func(*args, **kwargs)
        graded = torch.is_grad_enabled()
        self.busy = True
        try:
            torch._C._set_grad_enabled(False)
            return self._run(func, args, kwargs)
        finally:
            torch._C._set_grad_enabled(graded)
            self.busy, self.running = False, None

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an op and write it down."""
        flat: list[Any] = []
        # What is written there has no gradient.
        cut = not self.passes and func._schema.is_mutable

        def given(value: Any) -> Any:
            first = not flat
            flat.append(value)
            node = self.node(value) if isinstance(value, Tensor) else value
            return self._passes_not(node) if cut and not first else node

        nodes: Any = map_aggregate((args, kwargs), given)
        self.running = node = self._write(func, *nodes)
        try:
            with no_python_dispatcher():  # as in a run of the model: only here it is a mode's
                out = func(*args, **kwargs)
        except Exception:  # which the model may catch, and go another way
            self.graph.erase_node(node)
            raise
        self.read_by(func, flat)
        self._cast(func, (args, kwargs), flat, node, out)
        if any(out is t for t in flat) and not func._schema.is_mutable:
            self.graph.erase_node(node)  # such as contiguous() of what is
        else:
            self._keep(out, node)
        return out

    def _write(self, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
        name = getattr(getattr(target, "overloadpacket", target), "__name__", None)
        node = self.graph.create_node("call_function", target, name=name)
        node.args, node.kwargs = args, kwargs or {}  # given at once, each would be looked through
        node.meta["nn_module_stack"] = dict(self._stack)
        if line := called_at():
            node.meta["stack_trace"] = line
        return node

    def _keep(self, out: Any, node: fx.Node) -> None:
        """Remember which tensors the node computed."""
        if isinstance(out, Tensor):
            memory = out.untyped_storage()._cdata
            if memory not in self._memories or _writes(node):
                self._own.add(memory)
            self._knows(out, node)
            if not self.passes:
                self._cut[node] = None
        elif isinstance(out, (tuple, list)):
            parts = [self._write(operator.getitem, (node, i)) for i in range(len(out))]
            for part, one in zip(parts, out, strict=True):
                self._keep(one, part)
            node.meta["val"] = tuple(part.meta["val"] for part in parts)
        else:
            node.meta["val"] = out

    def _form(self, tensor: Tensor) -> _Form:
        """What the node's value will tell of the tensor, when the run is over."""
        _refuse_odd(tensor)
        memory = tensor.untyped_storage()
        if memory._cdata not in self._memories:  # held weakly, its address is not given to another
            self._memories[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
        self._devices.add(tensor.device)
        return _Form(
            memory._cdata,
            int(tensor.storage_offset()),
            tensor.size(),
            tensor.stride(),
            tensor.dtype,
            tensor.device,
        )

    def returns(self, output: Any) -> None:
        """Let the graph return ``output``: the end of the run."""
        self.busy = True
        leaves = [self.node(t) if isinstance(t, Tensor) else t for t in pytree.tree_leaves(output)]
        self.graph.output(tuple(leaves))

    def finish(self) -> fx.Graph:
        """The graph; its nodes have tensors without numbers for values.

        They share memory where those of the run did. Fake tensors, which know devices, are made
        only where there are several: these import a compiler, which takes a second. To be asked for
        when no mode watches any more, as each tensor would be looked at.
        """
        for node in reversed(self.graph.nodes):
            if node.op in ("call_function", "get_attr") and not node.users and not _acts(node):
                self.graph.erase_node(node)
        mode = FakeTensorMode() if len(self._devices) > 1 else None
        memories = {}
        for address, (_, size) in self._memories.items():
            whole = torch.empty(size, dtype=torch.uint8, device="meta")
            memories[address] = whole.untyped_storage()

        def empty(form: Any) -> Any:
            if not isinstance(form, _Form):
                return tuple(map(empty, form)) if isinstance(form, tuple) else form
            meta = torch.empty(0, dtype=form.dtype, device="meta")
            meta.set_(memories[form.memory], form.offset, form.size, form.stride)
            return meta if mode is None else FakeTensor(mode, meta, form.device)

        for node in self.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = empty(node.meta["val"])
        return self.graph

    def take(self, name: str, leaf: Any) -> None:
        """An input of the graph."""
        node = self.graph.placeholder(name)
        node.meta["val"] = leaf
        if isinstance(leaf, Tensor):
            self._own.add(leaf.untyped_storage()._cdata)
            self._knows(leaf, node)

    def node(self, tensor: Tensor) -> fx.Node:
        """What computes the tensor."""
        found: fx.Node | None = self._nodes.get(tensor)
        if found is None:
            found = self._found(tensor)
        if found not in self._cut or not self.passes:
            return found
        if (outside := self._cut[found]) is None:  # it leaves a region of no_grad
            outside = self._cut[found] = self._detached(found, found.meta["val"])
        return outside

    def _detached(self, node: fx.Node, form: _Form) -> fx.Node:
        new = self._write(aten.detach.default, (node,))
        for key in ("nn_module_stack", "stack_trace"):  # gradients end where the node was made
            if key in node.meta:
                new.meta[key] = node.meta[key]
        new.meta["val"] = form
        return new

    def renamed(self, tensor: Tensor, node: fx.Node) -> None:
        """Note that a tensor has got the memory of a node's."""
        self._nodes[tensor] = self._detached(node, self._form(tensor))

    def computes(self, tensor: Tensor) -> bool:
        """Whether an op of the run has made the tensor, or it is an input."""
        return tensor in self._nodes

    def _passes_not(self, given: Any) -> Any:
        """What is written into a tensor under no_grad; numbers and places as they are."""
        form = given.meta["val"] if isinstance(given, fx.Node) else None
        if isinstance(form, _Form) and form.dtype.is_floating_point:
            return self._detached(given, form)
        return given

    def _found(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor that no op of the run has made."""
        name = self._names.get(id(tensor))
        _refuse_odd(tensor)
        if name is None and tensor.untyped_storage()._cdata in self._memories:
            known = self._at.get(self._form(tensor))
            if known is None and tensor.untyped_storage()._cdata not in self._own:
                return self._constant(tensor)  # another part of what was there before
            if known is None:
                raise CaptureError(
                    "a tensor shares memory with another in a way that cannot be followed.",
                    where=[where] if (where := source_of(called_at())) else [],
                    fix="write the line named with torch ops only.",
                )
            found = self._detached(known, self._form(tensor))
            self._knows(tensor, found)
            return found
        return self._constant(tensor, name)

    def _constant(self, tensor: Tensor, name: str | None = None) -> fx.Node:
        """An attribute of the graph: the model's, by its name there, or a copy."""
        if name is None:
            name = self._fresh_name()
            with torch.inference_mode(False):
                self.attributes[name] = tensor.detach().clone()
        else:
            self.attributes[name] = tensor
        found = self.graph.create_node("get_attr", name)
        self._knows(tensor, found)
        if name not in self._state and tensor.untyped_storage()._cdata not in self._of_numbers:
            self.strange[name] = found, source_of(called_at())
        return found

    def _knows(self, tensor: Tensor, node: fx.Node) -> None:
        """Remember that the node has the tensor."""
        form = self._form(tensor)
        node.meta["val"], self._nodes[tensor], self._at[form] = form, node, node

    def _fresh_name(self) -> str:
        taken = {name.partition(".")[0] for name in self._names.values()} | set(self.attributes)
        return next(n for i in range(len(taken) + 1) if (n := f"{LIFTED}_{i}") not in taken)

    def _cast(self, func: Any, call: Any, flat: Sequence[Any], node: fx.Node, out: Any) -> None:
        """Write down the casts of autocast, which take place inside of an op.

        It casts all arguments or none; where the op gives another type without it, it has. Else an
        op of several steps may still have cast what one of them reads.
        """
        if not torch._C._is_any_autocast_enabled():
            return
        devices = {t.device.type for t in flat if _is_floating(t)}
        casts = [torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)]
        if not casts:
            return
        flat, spec = pytree.tree_flatten(call)
        floating = {i: t for i, t in enumerate(flat) if _is_floating(t)}
        given = [t.to("meta") if isinstance(t, Tensor) else t for t in flat]
        args, kwargs = pytree.tree_unflatten(given, spec)
        types = _types(out)
        try:
            alike = not types or _types(func(*args, **kwargs)) == types
            if alike and not (types and _casts_to(types[0], func, floating.values())):
                node.meta[AUTOCAST] = casts[0]
                return
        except Exception:  # of types that do not go together
            pass
        nodes, _ = pytree.tree_flatten((node.args, node.kwargs))
        with self.graph.inserting_before(node):
            for i, tensor in floating.items():
                if tensor.dtype != types[0]:
                    cast = self._write(aten.to.dtype, (nodes[i], types[0]))
                    cast.meta["val"] = self._form(tensor.to(types[0]))
                    nodes[i] = cast
        node.args, node.kwargs = pytree.tree_unflatten(nodes, spec)

    # -- values that are read ---------------------------------------------------------------------

    def read_by(self, func: Any, flat: Sequence[Any]) -> None:
        """Note an op whose result, or the size of it, depends on values."""
        if takes_values(func, flat):
            assert self.running is not None
            name = self.running.target.overloadpacket.__name__  # type: ignore[union-attr]
            masks = [t for t in flat[1:] if is_mask(t)] if func in MASKED else []
            for node in dict.fromkeys(self._nodes.get(t, self.running) for t in masks) or [
                self.running
            ]:
                self.read(node, HOW.get(name, name))

    def read(self, node: fx.Node, how: str, leaves: bool = False) -> None:
        """Note that something reads the values of a node."""
        self._reads.append((node, how, source_of(called_at()), leaves))

    def of_numbers(self, tensor: Tensor) -> None:
        """Note a tensor that was made of numbers: what depends on inputs there was read."""
        memory = tensor.untyped_storage()
        self._of_numbers[memory._cdata] = StorageWeakRef(memory)

    def compare(self, other: Recorder) -> None:
        """Note the strange constants that ``other`` has not, the record of another input."""
        for name, (node, source) in self.strange.items():
            own, found = self.attributes[name].nan_to_num(), other.attributes.get(name)
            if found is None or not torch.equal(own, found.nan_to_num()):
                self._changing.add(node)
                self._reads.append((node, "another library or thread", source, True))

    def reads(self) -> tuple[Read, ...]:
        """Where values were read that other inputs or other parameters might have changed.

        To be asked for before ``finish``, which drops what has no users.
        """
        ends = {node for node, *_ in self._reads}
        by_inputs = (
            downstream(self.graph, lambda n: n.op == "placeholder" or n in self._changing) & ends
        )
        by_state = downstream(self.graph, lambda n: n.op == "get_attr" and n.target in self._state)
        found = {}
        for node, how, source, leaves in self._reads:
            if node in by_inputs or node in by_state:
                found[node, leaves] = Read(how, source, node in by_inputs, leaves)
        return tuple(dict.fromkeys(found.values()))

    # -- modules ----------------------------------------------------------------------------------

    @contextmanager
    def calls(self, model: nn.Module) -> Iterator[None]:
        """Meanwhile the calls of the model's modules are followed, by hooks, in this thread."""
        thread = threading.get_ident()
        times: dict[str, int] = {}

        def entered(path: str, kind: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                if threading.get_ident() == thread:
                    call = times[path] = times.get(path, -1) + 1
                    self._stack.append((f"{path}@{call}" if call else path, (path, kind)))

            return hook

        def left(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                self._stack.pop()

        with ExitStack() as hooks:
            for path, module in model.named_modules():
                if path:
                    hook = entered(path, _type_name(module))
                    before = module.register_forward_pre_hook(hook, prepend=True)
                    hooks.callback(before.remove)
                    hooks.callback(module.register_forward_hook(left, always_call=True).remove)
            yield


def _refuse_odd(tensor: Tensor) -> None:
    """Raise CaptureError for tensors that are more than values, or less."""
    odd = ""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        odd = "torch.func transforms such as vmap"
    elif type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        odd = f"tensors of class {type(tensor).__name__}"
    elif tensor.layout != torch.strided:
        odd = f"{tensor.layout} tensors"
    if odd:
        raise CaptureError(
            f"{odd} cannot be recorded.",
            where=[where] if (where := source_of(called_at())) else [],
            fix="write the line named with plain tensors.",
        )


def _acts(node: fx.Node) -> bool:
    """Whether a node does more than compute what it returns."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return False
    return not isinstance(node.target, torch._ops.OpOverload) or _writes(node)


def _writes(node: fx.Node) -> bool:
    """Whether a node is an op that writes into memory."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _types(out: Any) -> list[torch.dtype]:
    """The types of the floating tensors in a result."""
    return [t.dtype for t in pytree.tree_leaves(out) if _is_floating(t)]


def _casts_to(dtype: torch.dtype, func: Any, given: Collection[Tensor]) -> bool:
    """Whether autocast has a kernel for the op, and what is given is of this type in part only.

    On "meta" a convolution without a bias takes weights of any type.
    """
    keys = {f"Autocast{t.device.type.upper()}" for t in given}
    return any(t.dtype != dtype for t in given) and any(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in keys
    )


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
