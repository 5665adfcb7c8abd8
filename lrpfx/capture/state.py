"""The model's parameters and buffers: which tensors they are, and whether the graphs still fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrpfx.errors import CaptureError, some

#: Of each tensor what tells whether it has been replaced or written into.
Versions = dict[str, tuple[int, int]]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones under each of theirs."""
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    state.update(model.named_buffers(remove_duplicate=False))
    return state


def versions(state: Mapping[str, Tensor]) -> Versions:
    """What tells of each parameter and buffer whether it has been replaced or written into."""
    # Tensors made in inference mode keep no count of writes.
    return {name: (id(t), 0 if t.is_inference() else t._version) for name, t in state.items()}


class State:
    """Parameters and buffers of a model that was captured as it is now.

    Args:
        model: The model.
        fixed: What they are promised to stay, None if they may change.
        read: Copies of those whose values the graph holds, as a branch was taken by them.
    """

    def __init__(
        self, model: nn.Module, fixed: Versions | None, read: Mapping[str, Tensor]
    ) -> None:
        self._model, self.fixed, self._read = model, fixed, read
        self._forms = _forms(state_of(model))
        self._current: dict[str, Tensor] = {}
        self._modules: list[nn.Module] = []
        self._seen: list[Any] = []

    def current(self) -> dict[str, Tensor]:
        """Parameters and buffers as they are now; the same dict as long as they are the same.

        Raises:
            CaptureError: They have another form than when the model was captured, or were promised
                to stay and have not, or forward() branches on them.
        """
        if self._seen and self._seen == self._glance():
            self._check_read()
            return self._current
        state = state_of(self._model)
        forms = _forms(state)
        if forms != self._forms:
            changed = [n for n in self._forms if forms.get(n) != self._forms[n]]
            raise CaptureError(
                "the model's parameters changed form since it was captured.",
                where=some([f"{n}: {_change(self._forms[n], forms.get(n))}" for n in changed]),
                fix="make a new Explainer after .to(), .half() or a change of architecture.",
            )
        if self.fixed is not None and (now := versions(state)) != self.fixed:
            raise CaptureError(
                "the model's parameters changed, though they were promised to stay (freeze=True).",
                where=some([n for n in self.fixed if now.get(n) != self.fixed[n]]),
                fix="make a new Explainer, or leave freeze=False.",
            )
        self._modules, self._current = list(self._model.modules()), state
        self._seen = self._glance()
        self._check_read()
        return state

    def _check_read(self) -> None:
        changed = [n for n, t in self._read.items() if not torch.equal(t, self._current[n])]
        if changed:
            raise CaptureError(
                "forward() branches on values of parameters or buffers that have changed since.",
                where=some(changed),
                fix="make a new Explainer.",
            )

    def _glance(self) -> list[Any]:
        """What differs if anything has changed; by names, a large model takes ten times as long.

        Modules and tensors are held here, so that no others can have their ids.
        """
        tensors = self._current.values()
        seen: list[Any] = [(t.shape, t.dtype, t.device) for t in tensors]
        for module in self._modules:
            for held in (module._parameters, module._buffers, module._modules):
                seen.extend(map(id, held.values()))
        if self.fixed is not None:
            seen.extend(0 if t.is_inference() else t._version for t in tensors)
        return seen


def _forms(state: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """Shape, dtype and device of each parameter and buffer, and which other it is tied to."""
    first: dict[int, str] = {}
    return {
        name: (tuple(t.shape), t.dtype, t.device, f"same as {first.setdefault(id(t), name)}")
        for name, t in state.items()
    }


def _change(before: tuple[Any, ...], after: tuple[Any, ...] | None) -> str:
    if after is None:
        return f"{_shown(*before)} -> gone"
    if before[:3] == after[:3]:  # tied to another parameter, or no longer
        return f"{before[3]} -> {after[3]}"
    return f"{_shown(*before)} -> {_shown(*after)}"


def _shown(shape: tuple[int, ...], dtype: Any, device: Any, tied: str) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"
