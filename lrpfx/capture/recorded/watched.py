"""A recorder at work: beside ops it sees the ops inside of these, and what is no op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lrpfx.capture.reads import MASKED
from lrpfx.capture.recorded.recorder import Recorder


@contextmanager
def recording(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """Meanwhile what is computed is written down."""
    with (
        recorder.calls(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        enable_python_dispatcher(),
        _Leaves(recorder),
        _Functions(recorder),
        recorder,
    ):
        yield


class _Leaves(TorchDispatchMode):
    """Sees the ops that others are made of, for the values that these read."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._recorder.running is not None:
            self._recorder.read_by(func, pytree.tree_leaves(args) if func in MASKED else ())
        return func(*args, **kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees what is no op: modes of autograd, and values that leave PyTorch or come by copies."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        recorder, kwargs = self._recorder, kwargs or {}
        if recorder.busy:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            recorder.graded = args[0]
        elif func is _GET_DATA:
            return args[0].detach()
        elif func is _SET_DATA:
            tensor, value = args
            node = recorder.node(value)
            func(*args)
            recorder.renamed(tensor, node)
            return None
        elif func in _COPIES and isinstance(source := _data(func, args, kwargs), Tensor):
            like = source if func is torch.tensor else args[0]
            device = kwargs.get("device", source.device if func is torch.tensor else like.device)
            return source.detach().to(device, kwargs.get("dtype", like.dtype), copy=True)
        elif func is Tensor.__deepcopy__:
            if recorder.computes(args[0]):
                return args[0].detach().clone()
        elif func in _READERS and isinstance(args[0], Tensor):
            recorder.read(recorder.node(args[0]), _READERS[func], leaves=True)
        elif func in _MAKERS and not isinstance(data := _data(func, args, kwargs), Tensor):
            for tensor in pytree.tree_leaves(data):
                if isinstance(tensor, Tensor):
                    recorder.read(recorder.node(tensor), func.__name__, leaves=True)
            made = func(*args, **kwargs)
            recorder.of_numbers(made)
            return made
        return func(*args, **kwargs)


def _data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function that makes a tensor makes it of."""
    given = args[1:] if func is Tensor.new_tensor else args
    return given[0] if given else next(iter(kwargs.values()), None)


_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
_COPIES = {torch.tensor, Tensor.new_tensor}
#: What makes tensors of numbers, which may be those of tensors that are given in a list.
_MAKERS = {*_COPIES, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer}
#: What reads a tensor's memory without an op.
_READERS = {
    Tensor.numpy: "numpy",
    Tensor.__array__: "numpy",
    Tensor.__dlpack__: "numpy or another library",
    Tensor.tolist: "tolist",
    Tensor.data_ptr: "data_ptr",
    Tensor.storage: "storage",
    Tensor.__repr__: "its printed form",
    Tensor.__format__: "its printed form",
    Tensor.untyped_storage: "storage",
    Tensor.__reduce_ex__: "pickle",
}
