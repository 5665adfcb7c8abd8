# %% [markdown]
# # Training on relevance
#
# A model that is right for the wrong reason: in the training set every 8 bears a mark in the
# corner, and the network reads the mark. Relevance shows it; and as relevance can be
# differentiated, a penalty on it mends it. The page is the output of the script
# `docs/tutorials/training.py`.
#
# ## A flaw in the data

# %%
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import lrpfx

pixels, labels = load_digits(return_X_y=True)
x = F.pad(torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, (1, 1, 1, 1))
y = torch.tensor(labels)
x, y, x_test, y_test = x[:1000], y[:1000], x[1000:], y[1000:]


def marked(x, which):
    x = x.clone()
    x[which, :, :2, :2] = 1.0  # a mark in the upper left corner
    return x


x = marked(x, y == 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(300, 10),
    )


def test(model):
    """How many 8s are found, and how many other digits with the mark are taken for one."""
    model.eval()
    eights = model(x_test[y_test == 8]).argmax(1) == 8
    others = marked(x_test, y_test != 8)[y_test != 8]
    print(f"8s without the mark that are found:       {eights.float().mean():4.0%}")
    fooled = model(others).argmax(1) == 8
    print(f"other digits with the mark taken for 8s:  {fooled.float().mean():4.0%}")


model = network()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(8):
    model.train()
    for batch in torch.randperm(len(x)).split(50):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
test(model)

# %% [markdown]
# The maps say why: of an 8 in the training set much of the relevance is in the corner.

# %%
eights = x[y == 8][:4]
before = lrpfx.explain(model, eights, target=8)
print(f"share of the corner: {(before.relevance[..., :2, :2].sum() / before.relevance.sum()):.0%}")
before

# %% [markdown]
# ## A penalty on the corner
#
# Make the Explainer in eval mode, then train. It then explains the model as it is in eval mode
# (running statistics, no dropout), with the parameters of the moment. `create_graph=True`
# keeps the graph of relevance, so that `backward()` reaches the parameters through it. The mark can
# speak for an 8, or against every other digit: so the relevance of all ten classes is penalized.

# %%
model = network()
explainer = lrpfx.Explainer(model.eval(), x[:2])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(8):
    model.train()
    for batch in torch.randperm(len(x)).split(50):
        relevance = explainer(x[batch], "all", create_graph=True).relevance  # (10, N, 1, 10, 10)
        corner = relevance[..., :2, :2].abs().sum((0, 2, 3, 4)).mean()
        loss = F.cross_entropy(model(x[batch]), y[batch]) + corner
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
test(model)

# %%
after = explainer(eights, 8)
print(f"share of the corner: {(after.relevance[..., :2, :2].sum() / after.relevance.sum()):.0%}")
lrpfx.heatmap.grid(eights, {"before": before, "after": after}, clip=99)

# %% [markdown]
# ## What is easily forgotten
#
# Without `create_graph=True` relevance has no graph, and a loss of it could not train anything.
# That is an error, and not a penalty that does nothing:

# %%
model.train()
loss = explainer(x[:8], y[:8]).relevance.abs().sum()
try:
    loss.backward()
except lrpfx.errors.LrpError as error:
    print(error)

# %% [markdown]
# The note of an explanation that is made while the model trains says which mode it explains:

# %%
for note in explainer(x[:8], y[:8]).report.notes:
    print(note)
