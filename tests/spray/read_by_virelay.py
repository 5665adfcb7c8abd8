"""Reads a project by ViRelAy's own reader, in an environment of its own: ``make virelay``.

.venv-virelay/bin/python tests/spray/read_by_virelay.py project.yaml
"""

import json
import sys

from virelay.model import Project


def main(path: str) -> None:
    project = Project(path)
    (method,) = project.get_analysis_methods()
    categories = project.get_analysis_categories(method)
    embeddings = project.get_analysis_embedding_names(method)
    (clustering,) = project.get_analysis_clustering_names(method)
    analysis = project.get_analysis(method, categories[0].name, clustering, "spectral")
    first = int(analysis.attribution_indices[0])
    attribution, sample = project.get_attribution(first), project.get_sample(first)
    told = {
        "categories": [[c.name, c.human_readable_name] for c in categories],
        "embeddings": embeddings,
        "clusters": analysis.clustering.tolist(),
        "indices": analysis.attribution_indices.tolist(),
        "eigenvalues": len(analysis.eigenvalues),
        "label": attribution.labels[0].name,
        "last": project.get_attribution(0).labels[0].name,
        "attribution": list(attribution.data.shape),
        "sample": list(sample.data.shape),
        "heatmap": list(attribution.render_heatmap("blue-white-red").shape),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
