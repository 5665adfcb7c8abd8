"""Random networks under random rules and a random condition, against the oracle's masks."""

from typing import Any

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lrpfx.concepts import Neuron
from tests.oracle import laws, reference
from tests.oracle.laws import Case
from tests.rules.test_laws import cases


@given(case=cases(max_inputs=2), data=st.data())
def test_masks_are_those_of_the_oracle(case: Case, data: st.DataObject) -> None:
    """Some numbers of one op's output are kept; what goes beside it flows on."""
    network = laws.folded_network(case.network)
    explainer = laws.explainer(case.network)
    ruled = [
        k
        for k, node in enumerate(network.nodes)
        if node.op in reference.AFFINE and network.owners.count(k) == 1
    ]
    places = [k for k in ruled if any(r.module == f"layers.{k}" for r in explainer.report.rows)]
    assume(places)
    place = data.draw(st.sampled_from(places))
    size = int(np.prod(network.shapes[place]))
    numbers = data.draw(st.sets(st.integers(0, size - 1), max_size=size))
    kept = np.zeros(size)
    kept[list(numbers)] = 1.0
    masks = {place: kept.reshape(network.shapes[place])}
    values = network.relevance(case.seed, masks)
    expected = [v for v, n in zip(values, network.nodes, strict=True) if n.op == "input"]
    conditions: list[Any] = [{f"layers.{place}": (Neuron(), sorted(numbers))}]
    inputs, seed = laws.tensors(case.network), torch.from_numpy(case.seed)
    for ledger in (True, False):
        got = explainer(inputs, seed, conditions=conditions, through="all", ledger=ledger)
        relevance = [r[0] for r in got.relevance]
        assert laws.relative(relevance, expected) < 1e-9
