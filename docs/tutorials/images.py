# %% [markdown]
# # Images
#
# A small residual network learns handwritten digits; then we ask which pixels speak for its answers.
# Everything on this page is the output of the script
# `docs/tutorials/images.py`, which runs in seconds on two cores. With a network of
# your own, begin at "Explain".
#
# ## A model and its data
#
# The digits come with scikit-learn. Each is 8 x 8 pixels; enlarged they make better pictures.

# %%
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
x = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear")  # (1797, 1, 20, 20)
y = torch.tensor(labels)
x, y, x_test, y_test = x[:1400], y[:1400], x[1400:], y[1400:]


class Net(nn.Module):
    """Written as people write it: functions, a skip connection, batch norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32 * 5 * 5, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(self.down(x))
        x = F.relu(self.bn2(self.conv(x)) + x)
        return self.head(F.max_pool2d(x, 2).flatten(1))


model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(4):
    for batch in torch.randperm(len(x)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
model.eval()
accuracy = (model(x_test).argmax(1) == y_test).float().mean()
print(f"accuracy on {len(x_test)} test digits: {accuracy:.3f}")

# %% [markdown]
# ## Explain
#
# A model in eval mode, a batch of inputs. The last line of a cell shows an explanation as a picture:
# red pixels raised the logit of the class, blue ones lowered it.

# %%
import lrpfx

digits = torch.stack([(y_test == d).nonzero()[0, 0] for d in (0, 3, 4, 8)])
images, classes = x_test[digits], y_test[digits]
explanation = lrpfx.explain(model, images, target=classes)
explanation

# %% [markdown]
# Without `rules=` each op gets the rule that fits where it stands. The report says which, and what
# became of the relevance: it starts from the logits, and what does not reach the pixels was
# *absorbed* on the way, mostly by biases, which are part of the logit and no part of the picture.

# %%
explanation.report

# %% [markdown]
# `stem+bn1` is the first convolution, with the batch norm that was folded into it; the sum and the
# functions have rows of their own, though they are no modules.
#
# ## Which rules
#
# Several rule sets beside each other, on one scale per map. `clip=99` ends the colours at the 99th
# percentile, so that a single pixel does not take all of them. `epsilon_all` is close to gradient
# times input, and noisy. The z-plus rule of `epsilon_plus` keeps positive contributions only.
# `EpsilonGammaBox` knows that pixels lie between 0 and 1, and so lets the black background speak, too.

# %%
sets = ["epsilon_all", "epsilon_plus", "epsilon_plus_flat"]
sets.append(lrpfx.composites.EpsilonGammaBox(low=0.0, high=1.0))
maps = {str(s).split("(")[0]: lrpfx.explain(model, images, classes, rules=s) for s in sets}
lrpfx.heatmap.grid(images, maps, clip=99, wrap=5)

# %% [markdown]
# ## Why not another class
#
# What speaks for a 3 in the picture of an 8? The target is any class; `[[8, 3]] * n` would be both
# by one forward pass. Blue is what argues against a 3: the left half of the loops.

# %%
eight = x_test[y_test == 8][:1]
pair = lrpfx.explain(model, eight, target=[[8, 3]])  # relevance: (2 targets, 1 sample, 1, 20, 20)
lrpfx.heatmap.grid(
    eight, {"speaks for 8": pair.relevance[0], "speaks for 3": pair.relevance[1]}, clip=99
)

# %% [markdown]
# ## Many images, and the layers inside
#
# Each call of `explain` captures the model anew. An `Explainer` does it once and then takes batches
# of any size; `layers=` asks for the relevance at the outputs of modules.

# %%
explainer = lrpfx.Explainer(model, images)
total = torch.zeros(10, 1, 20, 20)
for batch, target in zip(x_test.split(64), y_test.split(64)):
    found = explainer(batch, target)
    total.index_add_(0, target, found.relevance)
lrpfx.heatmap.heatmap(total, titles=[f"all test digits {d}" for d in range(10)], columns=5)

# %%
explainer(images, classes, layers=["stem", "down", "conv"]).layers

# %% [markdown]
# ## Is the map about the model?
#
# A sum that is conserved proves little. A better question: do the pixels that the map points at
# matter? Blacken the most relevant twenty of each digit, and as many others of it at random.

# %%
relevance = explainer(x_test, y_test).relevance


def logit_without(score):
    best = score.flatten(1).topk(20).indices
    dark = x_test.flatten(1).scatter(1, best, 0.0).view_as(x_test)
    return model(dark).gather(1, y_test[:, None]).mean().item()


ink = x_test > 0.1
print(f"mean logit of the true class:    {model(x_test).gather(1, y_test[:, None]).mean():6.2f}")
print(f"without 20 pixels at random:     {logit_without(torch.rand_like(x_test) * ink):6.2f}")
print(f"without the 20 most relevant:    {logit_without(relevance * ink):6.2f}")

# %% [markdown]
# Next: [choose rules](../howto.md), [what the report says](../report.md),
# [concepts](../concepts.md): which of the model's own features carried the relevance.
