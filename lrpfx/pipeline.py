"""A pipeline of Hugging Face -> its model, and texts and images as the model takes them.

It is known by what it has (a model, and a tokenizer or a processor), so nothing is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from lrpfx.errors import InputError, TargetError


class Pipeline:
    """What is used of a pipeline.

    Args:
        pipeline: A ``transformers.Pipeline``, or another object with a model in it.
    """

    def __init__(self, pipeline: Any) -> None:
        self.model: nn.Module = pipeline.model
        self._tokenizer = getattr(pipeline, "tokenizer", None)
        names = ("image_processor", "feature_extractor")
        self._processors = [getattr(pipeline, name, None) for name in names]

    @property
    def dynamic(self) -> tuple[int, ...]:
        """The number of tokens varies."""
        return () if self._tokenizer is None else (1,)

    def inputs(self, given: Any) -> Any:
        """Texts by the tokenizer, images by the processor; tensors as they are.

        Args:
            given: One text or image, several, or a pair of texts as pipelines take it, a dict of
                "text" and "text_pair".

        Raises:
            InputError: The pipeline has none of the two.
        """
        several = isinstance(given, (list, tuple))
        first = given[0] if several and len(given) else given
        if isinstance(given, Mapping) and given.get("text") is not None:
            first = given["text"]
        if not isinstance(first, str) and not hasattr(first, "convert"):  # no image of PIL's either
            return given
        if isinstance(first, str):
            process, options = self._tokenizer, {"padding": several and len(given) > 1}
        else:
            process, options = next((p for p in self._processors if p is not None), None), {}
        if process is None:
            raise InputError(
                f"the pipeline has nothing that takes a {type(first).__name__}.",
                fix="give tensors, as its model takes them.",
            )
        if isinstance(given, Mapping):
            options |= {name: [text] for name, text in given.items()}
            made = dict(process(return_tensors="pt", **options))
        else:
            made = dict(
                process(list(given) if several else [given], return_tensors="pt", **options)
            )
        device = next(self.model.parameters()).device
        made = pytree.tree_map(lambda t: t.to(device), made)
        return made | self._without_cache()

    def _without_cache(self) -> dict[str, Any]:
        takes = inspect.signature(self.model.forward).parameters
        return {"use_cache": False} if "use_cache" in takes else {}

    def wrt(self, inputs: Any, wrt: Any) -> Any:
        """Of a text the tokens are explained, and not their types and positions."""
        tokens = isinstance(inputs, Mapping) and "input_ids" in inputs
        return "input_ids" if wrt is None and tokens else wrt

    def target(self, target: Any) -> Any:
        """A label by its name.

        Raises:
            TargetError: The model's configuration has no such label.
        """
        if not isinstance(target, str) or target == "all":
            return target
        labels = getattr(self.model.config, "label2id", None) or {}
        if target not in labels:
            raise TargetError(
                f"the model has no label {target!r}.", fix=f"its labels are {', '.join(labels)}."
            )
        return int(labels[target])


def pipeline_of(model: Any) -> Pipeline | None:
    """What is a pipeline as one; None for models."""
    if isinstance(model, Pipeline):  # of an Explainer that is made again
        return model
    if isinstance(model, (nn.Module, type)) or not callable(model):
        return None
    parts = ("tokenizer", "image_processor", "feature_extractor")
    complete = any(getattr(model, name, None) is not None for name in parts)
    complete = complete and isinstance(getattr(model, "model", None), nn.Module)
    return Pipeline(model) if complete else None
