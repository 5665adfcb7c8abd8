"""Inputs and outputs of any structure -> flat lists of leaves, and back."""

from lrpfx.capture.forms.chosen import Wrt, argument_names, chosen_inputs, dotted_names
from lrpfx.capture.forms.inputs import (
    Inputs,
    Signature,
    TensorForm,
    check_inputs,
    copies,
    flatten_inputs,
    form_of,
    has_form,
    input_paths,
    is_explained,
    is_finite,
    key_paths,
    split_inputs,
    varying_sizes,
)
from lrpfx.capture.forms.opened import PLAIN, leaves_in, opened, tensors_of
from lrpfx.capture.forms.outputs import AsDict, from_dicts, is_dataclass, tensors_in, to_dicts

__all__ = [
    "AsDict",
    "Inputs",
    "PLAIN",
    "Signature",
    "TensorForm",
    "Wrt",
    "argument_names",
    "check_inputs",
    "chosen_inputs",
    "copies",
    "dotted_names",
    "flatten_inputs",
    "form_of",
    "from_dicts",
    "has_form",
    "input_paths",
    "is_dataclass",
    "is_explained",
    "is_finite",
    "key_paths",
    "leaves_in",
    "opened",
    "split_inputs",
    "tensors_in",
    "tensors_of",
    "to_dicts",
    "varying_sizes",
]
