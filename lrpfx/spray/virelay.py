"""Maps and clusters -> a project that ViRelAy opens.

Written for what the reader of ViRelAy 0.6 takes, where that and its published format differ: labels
are integers that the map of labels lists, the categories of an analysis are found in it by their
"WordNet id", and the project is YAML, of which JSON is a part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lrpfx.errors import InputError
from lrpfx.spray.cluster import SpectralRelevance


def to_virelay(
    folder: str | os.PathLike[str],
    maps: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    predictions: Tensor | ArrayLike,
    strategies: Mapping[int, tuple[Sequence[int], SpectralRelevance]],
    *,
    images: Tensor | ArrayLike,
    class_names: Sequence[str] | None = None,
    explained: Literal["true_label", "predicted_label"] = "true_label",
    name: str = "lrpfx",
    model: str = "model",
    embeddings: Sequence[Literal["tsne", "umap"]] = ("tsne",),
) -> Path:
    """Write a project folder for ViRelAy.

    Args:
        folder: It is made if it is not there.
        maps: Relevance, (N, C, H, W) or (N, H, W).
        labels: The class of each sample, (N,).
        predictions: The model's output, (N, classes), or the predicted classes, (N,).
        strategies: By class the indices of its samples, and what was fitted to their maps.
        images: The samples, (N, C, H, W).
        class_names: Of all classes.
        explained: What the maps explain.
        name: Of the project.
        model: Its name.
        embeddings: Beside the spectral one, in two dimensions.

    Returns:
        The project file: ``virelay <file>`` opens it.

    Raises:
        InputError: h5py is not installed, arrays do not belong together, or the folder cannot be
            written.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError(
            "files for ViRelAy are written by h5py.", fix="pip install 'lrpfx[virelay]'."
        ) from error
    relevance, truth, told, pictures = map(_array, (maps, labels, predictions, images))
    if relevance.ndim == 3:
        relevance = relevance[:, None]
    if told.ndim == 1:
        told = np.eye(int(max(told.max(), truth.max())) + 1, dtype=np.float32)[told]
    n, classes = len(relevance), max(told.shape[-1], int(truth.max()) + 1)
    if (
        relevance.ndim != 4
        or pictures.ndim != 4
        or not len(truth) == len(told) == len(pictures) == n
    ):
        raise InputError(
            f"maps {relevance.shape}, labels {truth.shape}, predictions {told.shape} and images "
            f"{pictures.shape} do not belong together.",
            fix="give maps and images (N, C, H, W), and a label and a prediction of each.",
        )
    names = [str(c) for c in class_names or range(classes)]
    where = Path(folder)
    try:
        where.mkdir(parents=True, exist_ok=True)
        with h5py.File(where / "dataset.h5", "w") as file:
            file["data"], file["label"] = _colours(pictures), truth.astype(np.int64)
        with h5py.File(where / "attributions.h5", "w") as file:
            file["attribution"] = relevance.astype(np.float32)
            file["label"], file["prediction"] = truth.astype(np.int64), told.astype(np.float32)
        with h5py.File(where / "analysis.h5", "w") as file:
            for label, (indices, found) in strategies.items():
                _category(file.create_group(str(label)), indices, found, embeddings)
        _write(
            where / "label_map.json",
            [{"index": i, "word_net_id": str(i), "name": name} for i, name in enumerate(names)],
        )
        project = {
            "name": name,
            "model": model,
            "label_map": "label_map.json",
            "dataset": {"name": name, "type": "hdf5", "path": "dataset.h5"},
            "attributions": {
                "attribution_method": "LRP",
                "attribution_strategy": explained,
                "sources": ["attributions.h5"],
            },
            "analyses": [{"analysis_method": "SpRAy", "sources": ["analysis.h5"]}],
        }
        _write(where / "project.yaml", {"project": project})
    except OSError as error:
        raise InputError(
            f"{where} cannot be written: {type(error).__name__}: {error}",
            fix="give a folder that can be written.",
        ) from error
    return where / "project.yaml"


def _category(
    group: Any, indices: Sequence[int], found: SpectralRelevance, embeddings: Sequence[str]
) -> None:
    """Of one class: which samples, embeddings of their maps, and clusters."""
    if len(indices) != len(found.labels_):
        raise InputError(
            f"category {group.name[1:]} has {len(indices)} samples, and {len(found.labels_)} maps "
            "were clustered.",
            fix="give the indices of the maps that fit() was called with.",
        )
    group["index"] = np.asarray(indices, dtype=np.uint32)
    group["embedding/spectral"] = found.embedding_.astype(np.float32)
    spectral = group["embedding/spectral"]
    spectral.attrs["eigenvalue"] = found.eigenvalues_.astype(np.float32)
    for method in embeddings:
        group[f"embedding/{method}"] = found.embed(method).astype(np.float32)  # type: ignore[arg-type]
        group[f"embedding/{method}"].attrs["embedding"] = "features"
        group[f"embedding/{method}"].attrs["index"] = np.array([0, 1])
    name = f"{found.clusterer}-{found.n_clusters_}" if found.clusterer == "kmeans" else "hdbscan"
    group[f"cluster/{name}"] = found.labels_.astype(np.int32)
    group[f"cluster/{name}"].attrs["embedding"] = "spectral"
    group[f"cluster/{name}"].attrs["k"] = found.n_clusters_
    group[f"cluster/{name}"].attrs["index"] = np.arange(found.n_clusters_)


def _colours(images: NDArray[Any]) -> NDArray[np.uint8]:
    """Bytes (N, H, W, 3), from the darkest to the brightest value of all."""
    if images.shape[1] != 3:
        images = np.repeat(images.mean(1, keepdims=True), 3, axis=1)
    low, high = float(images.min()), float(images.max())
    scaled = (images - low) / ((high - low) or 1.0) * 255
    return scaled.round().astype(np.uint8).transpose(0, 2, 3, 1)


def _array(values: Tensor | ArrayLike) -> NDArray[Any]:
    return np.asarray(torch.as_tensor(values).detach().cpu().numpy())


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
