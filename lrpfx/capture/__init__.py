"""A model and inputs -> a graph of ATen ops that computes what the model computes."""

from lrpfx.capture.captured import Captured, Program
from lrpfx.capture.checks import (
    agrees,
    as_captured,
    backward_note,
    check_faithful,
    mixing_note,
    rounded,
    worst_difference,
)
from lrpfx.capture.forms import (
    Inputs,
    Signature,
    TensorForm,
    Wrt,
    argument_names,
    check_inputs,
    chosen_inputs,
    copies,
    dotted_names,
    flatten_inputs,
    from_dicts,
    has_form,
    input_paths,
    is_explained,
    is_finite,
    leaves_in,
    opened,
    split_inputs,
    tensors_in,
    tensors_of,
    to_dicts,
    varying_sizes,
)
from lrpfx.capture.front import By, Way, capture
from lrpfx.capture.lines import first_line
from lrpfx.capture.preserve import preserved
from lrpfx.capture.quiet import quiet
from lrpfx.capture.reads import Read
from lrpfx.capture.recorded import AUTOCAST
from lrpfx.capture.release import lines_forgotten, trim
from lrpfx.capture.running import run_given, run_model
from lrpfx.capture.state import State, Versions, state_of, versions
from lrpfx.capture.tracing import TRACING, tracing

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
