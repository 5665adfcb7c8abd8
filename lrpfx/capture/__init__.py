"""A model and inputs -> a graph of ATen ops that computes what the model computes."""

from lrpfx.capture.alone import mixing_note
from lrpfx.capture.backwards import backward_note
from lrpfx.capture.chosen import Wrt, argument_names, chosen_inputs, dotted_names
from lrpfx.capture.export import TRACING, Captured, Program, tracing
from lrpfx.capture.faithful import (
    agrees,
    as_captured,
    check_faithful,
    rounded,
    worst_difference,
)
from lrpfx.capture.front import By, Way, capture
from lrpfx.capture.inputs import (
    Inputs,
    Signature,
    TensorForm,
    check_inputs,
    copies,
    flatten_inputs,
    has_form,
    input_paths,
    is_explained,
    is_finite,
    split_inputs,
    varying_sizes,
)
from lrpfx.capture.lines import first_line
from lrpfx.capture.opened import leaves_in, opened, tensors_of
from lrpfx.capture.outputs import from_dicts, tensors_in, to_dicts
from lrpfx.capture.preserve import preserved
from lrpfx.capture.quiet import quiet
from lrpfx.capture.reads import Read
from lrpfx.capture.recorder import AUTOCAST
from lrpfx.capture.release import lines_forgotten, trim
from lrpfx.capture.running import run_given, run_model
from lrpfx.capture.state import State, Versions, state_of, versions

__all__ = [
    "AUTOCAST",
    "By",
    "Captured",
    "Inputs",
    "Program",
    "Read",
    "Signature",
    "State",
    "TensorForm",
    "TRACING",
    "Versions",
    "Way",
    "Wrt",
    "agrees",
    "argument_names",
    "as_captured",
    "backward_note",
    "capture",
    "check_faithful",
    "check_inputs",
    "chosen_inputs",
    "copies",
    "dotted_names",
    "first_line",
    "flatten_inputs",
    "from_dicts",
    "has_form",
    "input_paths",
    "is_explained",
    "is_finite",
    "leaves_in",
    "lines_forgotten",
    "mixing_note",
    "opened",
    "preserved",
    "quiet",
    "rounded",
    "run_given",
    "run_model",
    "split_inputs",
    "state_of",
    "tensors_in",
    "tensors_of",
    "to_dicts",
    "tracing",
    "trim",
    "varying_sizes",
    "versions",
    "worst_difference",
]
