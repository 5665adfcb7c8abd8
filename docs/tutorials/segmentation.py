# %% [markdown]
# # Segmentation
#
# A small U-Net tells circles from squares, pixel by pixel. What is explained is then a choice: one
# pixel, a region, or all that it found of a class. The page is the output of the script
# `docs/tutorials/segmentation.py`.
#
# ## A model and its data

# %%
import torch
import torch.nn.functional as F
from torch import nn

import lrpfx

torch.manual_seed(0)
SIZE = 32


def scenes(n):
    """Images (N, 1, 32, 32) of a circle and a square; classes 0 ground, 1 circle, 2 square."""
    grid = torch.arange(SIZE)
    centres = torch.randint(7, SIZE - 7, (2, 2, n, 1, 1))
    dy, dx = grid[:, None] - centres[:, 0], grid[None, :] - centres[:, 1]
    circle = dy[0] ** 2 + dx[0] ** 2 <= 25
    square = (dy[1].abs() <= 4) & (dx[1].abs() <= 4)
    labels = torch.where(circle, 1, torch.where(square, 2, 0))
    images = (labels > 0).float()[:, None] + 0.1 * torch.randn(n, 1, SIZE, SIZE)
    return images, labels


class UNet(nn.Module):
    """Two scales and a skip connection: (N, 1, H, W) -> (N, 3, H, W)."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(1, 8, 3, padding=1)
        self.coarse = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x):
        fine = F.relu(self.fine(x))
        coarse = self.coarse(F.max_pool2d(fine, 2))
        return self.head(torch.cat([fine, F.interpolate(coarse, scale_factor=2)], 1))


model = UNet()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(250):
    images, labels = scenes(16)
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
model.eval()

images, labels = scenes(2)
found = model(images).argmax(1)
print(f"right pixels: {(found == labels).float().mean():.3f}")
print(f"right pixels of circles and squares: {(found == labels)[labels > 0].float().mean():.3f}")

# %% [markdown]
# ## One pixel
#
# `target=(class, row, column)` is an index into a sample's output. The corner of the square is a
# square because of the corner's surroundings; the map ends where the receptive field does.

# %%
explainer = lrpfx.Explainer(model, images)
square = (labels[0] == 2).nonzero()
row, column = square[0].tolist()
explainer(images[:1], target=(2, row, column))

# %% [markdown]
# ## A region, and a class
#
# Slices in place of numbers make a region; a function of the output explains anything that can be
# added up, such as the mean logit of the pixels that were found to be circle.


# %%
def found_circles(output):
    """Logit of the class circle, mean over the pixels that the model takes for one: (N,)."""
    mask = output.argmax(1) == 1
    return (output[:, 1] * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


maps = {
    "square at rows 0 to 15": explainer(images, target=(2, slice(0, 16), slice(0, 32))),
    "all that is circle": explainer(images, target=found_circles),
    "ground, everywhere": explainer(images, target=lambda output: output[:, 0].mean((1, 2))),
}
lrpfx.heatmap.grid(images, maps, clip=99, wrap=4)

# %% [markdown]
# Left out, `target` would be the strongest output of each sample, which of a segmentation is one
# pixel of one class; a note says so:

# %%
for note in explainer(images).report.notes:
    print(note)

# %% [markdown]
# ## Why not a circle
#
# The difference of two classes says what tells them apart: red for square, blue for circle.

# %%
explainer(
    images, target=lambda output: ((output[:, 2] - output[:, 1]) * (labels == 2)).mean((1, 2))
).plot(clip=99, titles=["square, not circle"] * 2)
