# %% [markdown]
# # Tables and time series
#
# A table of measurements, a signal, a sequence: three small models and what they look at. The page
# is the output of the script `docs/tutorials/tables_and_series.py`.
#
# ## A table
#
# Thirty measurements of cells, benign or malignant, and a dense network on standardized columns.

# %%
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import nn

import lrpfx

torch.manual_seed(0)
data = load_breast_cancer()
rows = torch.tensor(data.data, dtype=torch.float32)
rows = (rows - rows.mean(0)) / rows.std(0)
labels = torch.tensor(data.target)  # 0 malignant, 1 benign


def fit(model, x, y, steps=150):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    accuracy = (model.eval()(x).argmax(1) == y).float().mean()
    print(f"accuracy: {accuracy:.3f}")
    return model


classifier = fit(nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2)), rows, labels)

# %% [markdown]
# Bars are sorted; `top=` keeps the largest, and the rest becomes one bar. Each label has the value of
# the input, so that "0 standard deviations" is seen to have no relevance: relevance is
# of *this input against zero*, here against the mean of the column.

# %%
names = list(data.feature_names)
explanation = lrpfx.explain(classifier, rows[:2], target=0)
explanation.plot(feature_names=names, top=8)

# %% [markdown]
# What matters over all rows is the mean of what mattered in each, by size:

# %%
every = lrpfx.explain(classifier, rows, target=0).relevance
lrpfx.heatmap.heatmap(
    every.abs().mean(0)[None], kind="table", feature_names=names, top=8, titles="mean |relevance|"
)

# %% [markdown]
# ## A signal (N, C, L)
#
# Two channels of noise; in class 1 the first channel has a bump at a random place. A convolution
# takes channels before time, so lrpfx draws a strip per channel.


# %%
def noise(n, length=64):
    return 0.3 * torch.randn(n, 2, length)


def with_bump(signals):
    n, _, length = signals.shape
    place = torch.randint(8, length - 8, (n, 1))
    bump = torch.exp(-0.5 * ((torch.arange(length) - place) / 4.0) ** 2)
    return torch.stack([signals[:, 0] + bump, signals[:, 1]], 1)


signals = torch.cat([noise(200), with_bump(noise(200))])
classes = torch.tensor([0] * 200 + [1] * 200)
convolutional = nn.Sequential(
    nn.Conv1d(2, 8, 7, padding=3), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(8, 2)
)
fit(convolutional, signals, classes)
lrpfx.explain(convolutional, signals[-2:], target=1).plot(feature_names=["first", "second"])

# %% [markdown]
# ## A sequence (N, T, D)
#
# A recurrent network takes time before features. The layer that takes the input tells lrpfx so; of a
# model that reshapes its input, say `kind="sequence"`. By default the gates of LSTM and GRU are
# taken as constants (Arras et al. 2017), which keeps relevance from growing with every step.


# %%
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps, self.head = nn.GRU(2, 12, batch_first=True), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.steps(x)[0].amax(1))


sequences = signals[:, :, ::4].transpose(1, 2).contiguous()  # (400, 16, 2)
recurrent = fit(Recurrent(), sequences, classes, steps=300)
explanation = lrpfx.explain(recurrent, sequences[-2:], target=1)
explanation.plot(feature_names=["first", "second"])

# %% [markdown]
# Each step of a recurrent layer becomes a part of the graph: setting up takes longer with their
# number, once per `Explainer`.
#
# ## A regression
#
# With one output the output is explained, and `target` is left out. Relevance starts from the
# output's own value, and the biases keep a part of it: `leaks` says where.

# %%
regression = nn.Sequential(nn.Linear(29, 8), nn.ReLU(), nn.Linear(8, 1))
radius, others = rows[:, :1], rows[:, 1:]
optimizer = torch.optim.AdamW(regression.parameters(), lr=1e-2)
for _ in range(200):
    optimizer.zero_grad()
    F.mse_loss(regression(others), radius).backward()
    optimizer.step()
explanation = lrpfx.explain(regression.eval(), others[:1])
print(explanation.report.leaks(3))
explanation.plot(feature_names=names[1:], top=6)
