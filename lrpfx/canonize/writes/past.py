"""Reads of places that a write left alone -> reads of what was there before it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lrpfx.canonize.insert import copied
from lrpfx.canonize.measure import Measured
from lrpfx.ops import bound_arguments, nodes_in, varying

aten = torch.ops.aten

_READS = {aten.index.Tensor, aten.select.int, aten.slice.Tensor, aten.narrow.default}
_READS |= {aten.index_select.default, aten.masked_select.default, aten.gather.default}
#: What makes several parts of a tensor.
SPLITS = {aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes}
SPLITS |= {aten.chunk.default}
#: Writes, and the name of what they write.
_WRITES: dict[Any, str] = {
    aten.index_put.default: "values",
    aten.slice_scatter.default: "src",
    aten.select_scatter.default: "src",
    aten.index_copy.default: "source",
    aten.scatter.src: "src",
    aten.masked_scatter.default: "source",
}


def reads_past_writes(module: fx.GraphModule) -> fx.GraphModule:
    """``write(x, q, one)[other]`` -> ``x[other]``, if what is written is not read there.

    So do exponentials that are divided group by group, each in its place, stay exponentials. Which
    places are written and read must not depend on the inputs; that they are others is measured.
    """
    graph = module.graph
    if not any(node.target is aten.exp.default for node in graph.nodes):
        return module
    takes = {*_READS, operator.getitem}
    reads = [n for n in graph.nodes if n.target in takes and _written(_reader(n)) is not None]
    if not reads:
        return module
    changing, measured = varying(graph), Measured(module)
    for read in reads:
        reader = _reader(read)
        while (values := _written(reader)) is not None:
            (write,) = nodes_in(reader.args[:1])
            (before,) = nodes_in(write.args[:1])
            places = {*reader.all_input_nodes, *write.all_input_nodes} - {write, values, before}
            if not changing.isdisjoint(places) or not measured.ignores(read, values):
                break
            if reader is read:
                read.update_arg(0, before)
                continue
            with graph.inserting_before(read):
                reader = copied(reader, {write: before}, reader)
            read.update_arg(0, reader)
    graph.eliminate_dead_code()
    return module


def _reader(read: fx.Node) -> fx.Node:
    """What takes a part of a tensor: the node, or what splits that, if the node is one part."""
    split = read.args[0] if read.target is operator.getitem else None
    return split if isinstance(split, fx.Node) and split.target in SPLITS else read


def _written(read: fx.Node) -> fx.Node | None:
    """What has been written into what a node reads, if that is a write of a tensor."""
    write = read.args[0] if read.target in {*_READS, *SPLITS} else None
    if not isinstance(write, fx.Node) or write.target not in _WRITES:
        return None
    given = bound_arguments(write)
    values = given[_WRITES[write.target]]
    return values if isinstance(values, fx.Node) and not given.get("accumulate") else None
