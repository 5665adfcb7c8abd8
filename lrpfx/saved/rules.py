"""Rules, selectors and composites <-> JSON: names of what the library has, and their fields.

A file names classes; it never says where to import them from. What can be named are the rules and
composites of the library, and the classes of the model's own modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor, nn

from lrpfx import composites, neuralize, rules
from lrpfx.composites import NAMED, Attending, Composite, First, Offered
from lrpfx.errors import InputError, SelectorError
from lrpfx.rules import Rule, Stabilizer

#: Frozen dataclasses, which their fields say all of.
_CLASSES = {
    cls.__name__: cls
    for cls in (*vars(rules).values(), First, Attending)
    if isinstance(cls, type) and issubclass(cls, (Rule, Stabilizer, First, Attending))
}
_PREDICATES = {
    predicate.__name__: predicate
    for predicate in (
        composites.gates,
        composites.recurrent_gates,
        composites.patch_embeddings,
        composites.pointwise_convolutions,
        composites.input_scales,
    )
}
_COMPOSITES: dict[str, type[Composite]] = {"Composite": Composite}
_COMPOSITES.update((cls.__name__, cls) for cls in NAMED.values())
_INSTEAD = (
    "leave rules as they are in your code, and give them to Explainer.load(..., rules=rules)."
)


def written(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What JSON has for a composite, entry, selector, rule or parameter of one.

    Args:
        value: It.
        tensors: Takes the tensors among parameters.

    Raises:
        InputError: It is code of the user's own.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        name = f"rules.{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Offered):
        return {"offered": [written(v, tensors) for v in value]}
    if isinstance(value, (tuple, list)):
        return [written(v, tensors) for v in value]
    if isinstance(value, type) and issubclass(value, nn.Module):
        return {"module": _name(value)}
    kind = type(value).__name__
    if _COMPOSITES.get(kind) is type(value):
        entries = [written(entry, tensors) for entry in value.entries]
        return {"composite": kind, "entries": entries, "over": written(value.over, tensors)}
    if _CLASSES.get(kind) is type(value):
        given = {f.name: written(getattr(value, f.name), tensors) for f in fields(value)}
        return {"class": kind, "fields": given}
    name = getattr(value, "__name__", "")
    if _PREDICATES.get(name) is value:
        return {"predicate": name}
    raise InputError(
        f"{name or repr(value)} is code of your own, which a file without code cannot hold.",
        fix=f"{_INSTEAD} A pickle of the Explainer can hold what is defined in a module.",
    )


def restored(node: Any, tensors: Mapping[str, Tensor], model: nn.Module) -> Any:
    """The value that ``written`` has made this of.

    Args:
        node: What JSON had.
        tensors: Those of the file.
        model: Whose modules' classes can be named.

    Raises:
        InputError: It is nothing that ``written`` writes.
        SelectorError: It names a class of module that the model does not have.
    """
    if isinstance(node, list):
        return tuple(restored(v, tensors, model) for v in node)
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "offered" in node:
        return Offered(restored(v, tensors, model) for v in node["offered"])
    if "module" in node:
        return _module_class(node["module"], model)
    if "predicate" in node:
        return _known(_PREDICATES, node["predicate"])
    if "class" in node:
        given = {k: restored(v, tensors, model) for k, v in node["fields"].items()}
        return _known(_CLASSES, node["class"])(**given)
    cls = _known(_COMPOSITES, node["composite"])
    entries = [restored(entry, tensors, model) for entry in node["entries"]]
    # A named one is not called with its parameters: its entries say all.
    composite: Composite = cls.__new__(cls)
    Composite.__init__(composite, entries, restored(node["over"], tensors, model))
    return composite


def _known(table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise InputError(
            f"there is no {name!r} among the rules and composites of this version.", fix=_INSTEAD
        )
    return table[name]


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _module_class(name: str, model: nn.Module) -> type[nn.Module]:
    """The class of that name among those of the model's modules, of PyTorch and of lrpfx."""
    own = {_name(cls): cls for module in model.modules() for cls in type(module).__mro__}
    known = [*vars(nn).values(), *vars(neuralize).values()]
    own |= {_name(cls): cls for cls in known if isinstance(cls, type)}
    if name not in own:
        raise SelectorError(f"no module of the model is a {name}, which rules name.", fix=_INSTEAD)
    return own[name]
