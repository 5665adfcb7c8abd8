"""What an installed lrpfx must do in a folder of its own; `make dist` runs it."""

from pathlib import Path

import torch
from torch import nn

import lrpfx

if __name__ == "__main__":
    torch.manual_seed(0)
    installed = Path(lrpfx.__file__).resolve()
    assert not (installed.parents[1] / "pyproject.toml").exists(), "this is the checkout"
    assert installed.with_name("py.typed").exists()
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).eval()
    explanation = lrpfx.explain(model, torch.rand(2, 1, 8, 8), rules="epsilon_plus_flat")
    explanation.plot("explanation.png")
    explanation.save("explanation.npz")
    assert repr(lrpfx.Explanation.load("explanation.npz")) == repr(explanation)
    print(f"lrpfx {lrpfx.__version__} from {installed.parent}: {explanation}")
