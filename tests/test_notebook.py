"""A fresh notebook shows pictures without any magic."""

import json
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent

CELLS = [
    """
import torch
from torch import nn
import lrpfx
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).eval()
e = lrpfx.explain(model, torch.rand(2, 1, 8, 8), layers=["*"])
""",
    "e",
    "e.plot()",
    "lrpfx.heatmap.grid(None, {'one': e, 'two': e})",
    "e.layers",
    """
import matplotlib
matplotlib.use("svg")
e.plot()
""",
    "%matplotlib inline",
    "e.plot()",
]


def test_a_fresh_kernel_shows_pictures_without_magic() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = [
        [output["data"] for output in cell["outputs"] if "data" in output]
        for cell in notebook["cells"]
    ]
    assert "text/html" in shown[1][0] and "data:image/png;base64" in shown[1][0]["text/html"]
    for cell in (2, 3, 5, 7):
        (data,) = shown[cell]
        assert "image/png" in data, json.dumps(sorted(data))
    assert len(shown[4][0]["text/plain"]) < 500
