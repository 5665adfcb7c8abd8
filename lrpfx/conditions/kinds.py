"""What a concept is: a part of a layer's relevance, by channel, neuron, token, head or direction.

A kind of concept says two things of a tensor of relevance: how much of it belongs to each concept
(``encode``), and what is left of it if only some concepts are kept (``mask``). Both are linear in
the relevance.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lrpfx.errors import InputError


class Concept(ABC):
    """A kind of concept; one of your own is a subclass with ``encode`` and ``mask``.

    Concepts are numbered from 0 to C - 1. With all of them kept, ``mask`` returns the relevance
    as it came, and ``encode`` sums over concepts to the sample's relevance.
    """

    @abstractmethod
    def encode(self, relevance: Tensor, activation: Tensor) -> Tensor:
        """Relevance of each concept.

        Args:
            relevance: Shape (N, ...), at the output of an op.
            activation: The op's output, of the same shape.

        Returns:
            Shape (N, C), summed over positions.
        """

    @abstractmethod
    def mask(self, relevance: Tensor, activation: Tensor, weights: Tensor) -> Tensor:
        """The relevance that is left if each concept is weighed.

        Args:
            relevance: Shape (N, ...), at the output of an op.
            activation: The op's output, of the same shape.
            weights: Shape (N, C): 1 for a concept that is kept, 0 for one that is not.

        Returns:
            Shaped like ``relevance``.
        """

    def positions(self, relevance: Tensor, activation: Tensor) -> Tensor | None:
        """Relevance of each concept at each position, (N, C, P); None if there are no positions.

        Args:
            relevance: Shape (N, ...), at the output of an op.
            activation: The op's output, of the same shape.
        """
        return None

    def at(self, shape: Sequence[Any], channels: int | None) -> Concept:
        """The kind as it is at a place of this shape.

        Args:
            shape: Of the place's output, "N" for the batch.
            channels: The dimension of its channels, None where that is not clear.

        Raises:
            ValueError: There are no such concepts at this place.
        """
        return self

    def number(self, concept: Any, shape: Sequence[int], count: int) -> int:
        """The number of a concept as users name it.

        Args:
            concept: As it was given.
            shape: Of one sample at this place.
            count: How many concepts there are.

        Raises:
            ValueError: There is no such concept.
        """
        if isinstance(concept, bool) or not hasattr(concept, "__index__"):
            raise ValueError(f"{concept!r} is no number of a concept")
        index = concept.__index__()
        if not -count <= index < count:
            raise ValueError(f"concept {index} is out of range, 0 to {count - 1}")
        return int(index % count)


@dataclass(frozen=True)
class _Along(Concept):
    """The slices of one dimension."""

    dim: int | None = None

    def encode(self, relevance: Tensor, activation: Tensor) -> Tensor:
        """Relevance of each slice, (N, C)."""
        return self.positions(relevance, activation).sum(2)

    def positions(self, relevance: Tensor, activation: Tensor) -> Tensor:
        """Relevance of each slice at each of the others' indices, (N, C, P)."""
        moved = relevance.movedim(self._dim(), 1)
        return moved.flatten(2) if moved.ndim > 2 else moved[:, :, None]

    def mask(self, relevance: Tensor, activation: Tensor, weights: Tensor) -> Tensor:
        """Each slice times its weight."""
        size = [1] * relevance.ndim
        size[0], size[self._dim()] = weights.shape
        return relevance * weights.reshape(size)

    def _dim(self) -> int:
        assert self.dim is not None, "taken at a place first"
        return self.dim

    def at(self, shape: Sequence[Any], channels: int | None) -> Concept:
        """With the dimension counted from the front."""
        dim = channels if self.dim is None else self.dim
        name = type(self).__name__
        if dim is None:
            raise ValueError(
                f"which dimension of {_shown(shape)} is meant is not clear; give {name}(dim)"
            )
        if not -len(shape) <= dim < len(shape) or dim % len(shape) == 0:
            raise ValueError(
                f"{name}(dim={dim}): the shape is {_shown(shape)}, and dimension 0 are the samples"
            )
        return replace(self, dim=dim % len(shape))


class Channel(_Along):
    """A channel: one feature at all positions.

    Args:
        dim: The dimension of the channels. None: dimension 1 behind convolutions, the last one
            behind linear layers and layer norms.

    Source: Achtibat et al. 2023 (CRP, doi 10.1038/s42256-023-00711-8), eq. 4.
    """


@dataclass(frozen=True)
class Token(_Along):
    """A position with all its features: one token of (N, T, D).

    Args:
        dim: The dimension of the positions.
    """

    dim: int | None = 1


@dataclass(frozen=True)
class Neuron(Concept):
    """One number of each sample: one channel at one position.

    A neuron is named by its index in a sample, such as (3, 0, 7), or by its number in the
    flattened sample.
    """

    def encode(self, relevance: Tensor, activation: Tensor) -> Tensor:
        """The relevance, flat: (N, C)."""
        return relevance.flatten(1)

    def mask(self, relevance: Tensor, activation: Tensor, weights: Tensor) -> Tensor:
        """Each number times its weight."""
        return relevance * weights.reshape(-1, *relevance.shape[1:])

    def number(self, concept: Any, shape: Sequence[int], count: int) -> int:
        """Of an index into a sample, its number in the flattened sample."""
        if not isinstance(concept, tuple):
            return super().number(concept, shape, count)
        if len(concept) != len(shape):
            raise ValueError(f"neuron {concept} is no index into a sample {_shown(shape)}")
        flat = 0
        for index, size in zip(concept, shape, strict=True):
            if not hasattr(index, "__index__") or not -size <= index < size:
                raise ValueError(f"neuron {concept} is out of range for a sample {_shown(shape)}")
            flat = flat * size + int(index) % size
        return flat


@dataclass(frozen=True)
class Head(Concept):
    """An attention head: of (N, H, T, D) dimension 1, of (N, T, H D) a block of features.

    Args:
        heads: How many there are; of keys and values in grouped-query attention, as many as these
            have.
        dim: The dimension that the heads are in. None picks dimension 1 if there are as many, else
            the last.
    """

    heads: int
    dim: int | None = None

    def encode(self, relevance: Tensor, activation: Tensor) -> Tensor:
        """Relevance of each head, (N, H)."""
        return self.positions(relevance, activation).sum(2)

    def positions(self, relevance: Tensor, activation: Tensor) -> Tensor:
        """Relevance of each head at each position and feature, (N, H, P)."""
        parts = relevance.unflatten(self._dim(), (self.heads, -1)).movedim(self._dim(), 1)
        each: Tensor = parts.flatten(2)
        return each

    def mask(self, relevance: Tensor, activation: Tensor, weights: Tensor) -> Tensor:
        """Each head times its weight."""
        dim = self._dim()
        parts = relevance.unflatten(dim, (self.heads, -1))
        size = [1] * parts.ndim
        size[0], size[dim] = weights.shape
        kept: Tensor = (parts * weights.reshape(size)).flatten(dim, dim + 1)
        return kept

    def _dim(self) -> int:
        assert self.dim is not None, "taken at a place first"
        return self.dim

    def at(self, shape: Sequence[Any], channels: int | None) -> Concept:
        """With the dimension of the heads."""
        if isinstance(self.heads, bool) or not isinstance(self.heads, int) or self.heads < 1:
            raise ValueError(f"{self.heads!r} is no number of heads")
        dim = self.dim
        if dim is None:
            dim = 1 if len(shape) == 4 and shape[1] == self.heads else len(shape) - 1
        if not -len(shape) <= dim < len(shape) or dim % len(shape) == 0:
            raise ValueError(f"{self} does not fit the shape {_shown(shape)}")
        dim %= len(shape)
        if not isinstance(shape[dim], int) or shape[dim] % self.heads:
            raise ValueError(
                f"{self.heads} heads do not divide the {shape[dim]} features of {_shown(shape)}"
            )
        return replace(self, dim=dim)


@dataclass(frozen=True, eq=False)
class Subspace(Concept):
    """The parts of the activation in given subspaces, and the rest as the last concept.

    With the vectors v of all subspaces, and u with a = sum_i (a . u_i) v_i for what they span, the
    relevance R = a c of the features parts into R_i = (a . u_i) (v_i . c), summed over the vectors
    of each subspace. The last concept is what they do not span, so that all sum to R.

    Args:
        bases: A basis (vectors as rows, (r, D)) for each subspace.
        names: Of the subspaces, for reports.
        encoder: The vectors u, shape (sum of r, D), such as the encoder of a sparse autoencoder;
            None: those of the pseudoinverse, which takes the vectors to be independent.
        dim: The dimension of the features; None: that of the channels.

    Raises:
        InputError: The vectors do not fit each other, or depend on each other.

    Source: Chormai et al. 2024 (PRCA, DRSA; arXiv 2212.14855), eq. 5 and 6.
    """

    bases: Sequence[Tensor]
    names: Sequence[str] | None = None
    encoder: Tensor | None = None
    dim: int | None = None
    _vectors: Tensor = field(init=False, repr=False)
    _readers: Tensor = field(init=False, repr=False)
    _groups: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Lay the vectors side by side, with those that read them."""
        bases = [torch.as_tensor(b).detach() for b in self.bases]
        name = type(self).__name__
        if not bases or any(b.ndim != 2 or not b.is_floating_point() for b in bases):
            forms = [tuple(b.shape) for b in bases]
            raise InputError(
                f"{name}: the vectors are rows of floating tensors (r, D), not {forms}.",
                fix="give a basis for each subspace.",
            )
        if len({b.shape[1] for b in bases}) != 1:
            raise InputError(
                f"{name}: the vectors are of different lengths: {[b.shape[1] for b in bases]}.",
                fix="give vectors of one layer.",
            )
        vectors = torch.cat([b.double() for b in bases])
        if self.names is not None and len(self.names) != len(bases):
            raise InputError(
                f"{name}: {len(self.names)} names for {len(bases)} concepts.",
                fix="give a name for each, or none.",
            )
        if self.encoder is not None:
            readers = torch.as_tensor(self.encoder).detach().double()
            if readers.shape != vectors.shape:
                raise InputError(
                    f"{name}: the encoder is {tuple(readers.shape)}, the vectors are "
                    f"{tuple(vectors.shape)}.",
                    fix="give a row for each vector.",
                )
        else:
            rank = int(torch.linalg.matrix_rank(vectors))
            if rank < len(vectors):
                raise InputError(
                    f"{name}: {len(vectors)} vectors span {rank} dimensions only, so how much of "
                    "each is in an activation is not defined.",
                    fix="leave out those that depend on others, or give an encoder.",
                )
            readers = torch.linalg.pinv(vectors).T
        groups = torch.repeat_interleave(torch.tensor([len(b) for b in bases]))
        for key, value in (("_vectors", vectors), ("_readers", readers), ("_groups", groups)):
            object.__setattr__(self, key, value)

    def encode(self, relevance: Tensor, activation: Tensor) -> Tensor:
        """Relevance of each subspace, and of the rest: (N, C + 1)."""
        a, c, vectors = self._features(relevance, activation)
        each = self._amounts(a) * (c @ vectors.T)
        spanned = each.flatten(1, -2).sum(1) if each.ndim > 2 else each
        count = len(self.bases)
        grouped = spanned.new_zeros(len(spanned), count).index_add(
            1, self._groups.to(spanned.device), spanned
        )
        rest = relevance.flatten(1).sum(1, keepdim=True) - grouped.sum(1, keepdim=True)
        return torch.cat([grouped, rest], 1)

    def mask(self, relevance: Tensor, activation: Tensor, weights: Tensor) -> Tensor:
        """The relevance of the parts that are kept."""
        a, c, vectors = self._features(relevance, activation)
        amounts = self._amounts(a)
        each = weights[:, :-1].index_select(1, self._groups.to(weights.device))
        rest = weights[:, -1:]
        form = (len(weights), *[1] * (a.ndim - 2), -1)
        kept = (amounts * (each - rest).reshape(form)) @ vectors + a * rest.reshape(form)
        return (kept * c).movedim(-1, self._dim())

    def _features(self, relevance: Tensor, activation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Activation a and c = R / a with the features last, and the vectors."""
        R, a = (t.movedim(self._dim(), -1) for t in (relevance, activation))
        # R = a c of every rule that multiplies by the activation; where a is zero nothing arrives.
        c = torch.where(a == 0, torch.zeros_like(R), R / torch.where(a == 0, 1, a))
        return a, c, self._vectors.to(R)

    def _amounts(self, a: Tensor) -> Tensor:
        return a @ self._readers.to(a).T

    def _dim(self) -> int:
        assert self.dim is not None, "taken at a place first"
        return self.dim

    def at(self, shape: Sequence[Any], channels: int | None) -> Concept:
        """With the dimension of the features."""
        along = _Along(self.dim).at(shape, channels)
        assert isinstance(along, _Along) and along.dim is not None
        size, width = shape[along.dim], self._vectors.shape[1]
        if size != width:
            raise ValueError(
                f"the vectors have {width} entries, and dimension {along.dim} of {_shown(shape)} "
                f"has {size}"
            )
        placed = copy.copy(self)
        object.__setattr__(placed, "dim", along.dim)
        return placed


class Direction(Subspace):
    """Directions in a layer's features, each a concept; and the rest as the last concept.

    Concept activation vectors, principal relevant components, latents of a sparse autoencoder
    (``vectors`` is its decoder). See ``Subspace``, whose subspaces have one dimension here.

    Args:
        vectors: Shape (C, D).
        names: See ``Subspace``; so are ``encoder`` and ``dim``.
        encoder: Shape (C, D).
        dim: Of the features.
    """

    def __init__(
        self,
        vectors: Tensor,
        names: Sequence[str] | None = None,
        encoder: Tensor | None = None,
        dim: int | None = None,
    ) -> None:
        vectors = torch.as_tensor(vectors)
        rows = list(vectors[:, None]) if vectors.ndim == 2 else [vectors]
        super().__init__(rows, names, encoder, dim)


def _shown(shape: Sequence[Any]) -> str:
    return f"({', '.join(map(str, shape))})"
