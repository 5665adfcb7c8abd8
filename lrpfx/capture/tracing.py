"""Whatever PyTorch records or traces of a model: one at a time, and without a word."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any
from unittest import mock

from lrpfx.capture.forms import key_paths
from lrpfx.capture.release import released

#: Held while a model is traced: torch.export is not re-entrant, and puts fake tensors into the
#: model's place of parameters for the time being.
TRACING = threading.RLock()


class _Unchecked:
    """Stands for reentrant checkpointing while a model is traced.

    That runs its function under no_grad, and leaves the rest of the trace under it.
    """

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """The function itself: what is kept for the backward pass does not concern a trace."""
        return function(*args)


@contextmanager
def tracing() -> Iterator[None]:
    """One trace at a time, without the tracer's log: what goes wrong is raised as one error."""
    logger = logging.getLogger("torch")
    nowhere = io.StringIO()  # a failing trace prints its graph
    with (
        TRACING,
        released(),
        key_paths(),
        warnings.catch_warnings(),
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        mock.patch("torch.utils.checkpoint.CheckpointFunction", _Unchecked),
    ):
        warnings.simplefilter("ignore")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
