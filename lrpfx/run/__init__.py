"""A rewritten graph, inputs and a target -> relevance, and from it an explanation."""

from lrpfx.run.alarm import Alarm, Watched
from lrpfx.run.assumptions import Assumptions
from lrpfx.run.backward import Largest, Pulled, Run, at_a_time
from lrpfx.run.blank import blank_notes
from lrpfx.run.books import Books, Made
from lrpfx.run.compiled import Compiled, CompiledRun
from lrpfx.run.conditioned import Init, condition_seeds, target_per_condition
from lrpfx.run.explicit import tidy
from lrpfx.run.gather import Bookings, Calls, Gather, absorbed_of, by_layer, reported
from lrpfx.run.gauge import Gauge
from lrpfx.run.graphs import Graphs
from lrpfx.run.halves import SIZES, in_float16, pull_scaled, unit_of
from lrpfx.run.mode import is_being_trained, mode_notes, without_graph
from lrpfx.run.parallel import through
from lrpfx.run.recorded import RecordedRun, Runs
from lrpfx.run.refuse import refuse_if_the_model_does, refuse_relevance, refuse_seed
from lrpfx.run.samples import is_batched
from lrpfx.run.spelled import Spelled
from lrpfx.run.targets import (
    Seed,
    Slope,
    Target,
    column_notes,
    each_target,
    is_several,
    make_seed,
)

__all__ = [
    "SIZES",
    "Alarm",
    "Assumptions",
    "Bookings",
    "Books",
    "Calls",
    "Compiled",
    "CompiledRun",
    "Gather",
    "Gauge",
    "Graphs",
    "Init",
    "Largest",
    "Made",
    "Pulled",
    "RecordedRun",
    "Run",
    "Runs",
    "Seed",
    "Slope",
    "Spelled",
    "Target",
    "Watched",
    "absorbed_of",
    "at_a_time",
    "blank_notes",
    "by_layer",
    "column_notes",
    "condition_seeds",
    "each_target",
    "in_float16",
    "is_batched",
    "is_being_trained",
    "is_several",
    "make_seed",
    "mode_notes",
    "pull_scaled",
    "refuse_if_the_model_does",
    "refuse_relevance",
    "refuse_seed",
    "reported",
    "target_per_condition",
    "through",
    "tidy",
    "unit_of",
    "without_graph",
]
