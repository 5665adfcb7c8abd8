"""Models that tests share: torchvision's architectures with random parameters."""

from collections import OrderedDict

import torch
import torchvision
from torch import Tensor, nn

CLASSES = 10


def torchvision_model(name: str, seed: int = 0) -> nn.Module:
    """Return torchvision's model ``name`` for 10 classes, float64, in evaluation mode.

    AlexNet and VGG get hidden linear layers of 64 units instead of 4096: nine tenths of their
    parameters say nothing that 64 do not, and cost a gigabyte in float64.
    """
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
        for parent in list(model.modules()):
            for key, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    sizes = (layer.in_features, layer.out_features)
                    setattr(parent, key, nn.Linear(*(64 if n == 4096 else n for n in sizes)))
    return randomize(model.double().to_empty(device="cpu").eval(), seed)


def residual(seed: int = 0) -> nn.Module:
    """Return a residual network of torchvision's own blocks, of a thousandth of its parameters."""
    block = torchvision.models.resnet.BasicBlock
    return _of_blocks(block(8, 8), block(8, 8), block(8, 16, 2, _shortcut(8)), block(16, 16), seed)


def bottlenecks(seed: int = 0) -> nn.Module:
    """Return a residual network of torchvision's bottlenecks, as small."""
    block = torchvision.models.resnet.Bottleneck
    return _of_blocks(block(8, 2), block(8, 2), block(8, 4, 2, _shortcut(8)), block(16, 4), seed)


def _shortcut(channels: int) -> nn.Module:
    out = 2 * channels
    return nn.Sequential(nn.Conv2d(channels, out, 1, 2, bias=False), nn.BatchNorm2d(out))


def _of_blocks(a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module, seed: int) -> nn.Module:
    """The stem and the head of a ResNet around four blocks, of 3 -> 8 -> 16 channels."""
    layers = OrderedDict(
        conv1=nn.Conv2d(3, 8, 7, 2, 3, bias=False),
        bn1=nn.BatchNorm2d(8),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, 2, 1),
        layer1=nn.Sequential(a, b),
        layer2=nn.Sequential(c, d),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(16, CLASSES),
    )
    return randomize(nn.Sequential(layers).double().eval(), seed)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters and batch norm statistics; biases and shifts are far from zero.

    Networks at initialisation have no biases and batch norms that do nothing; a rule that
    forgets either would go unseen.
    """
    g = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.normal_(0.0, (2 / layer.weight[0].numel()) ** 0.5, generator=g)
            if layer.bias is not None:
                layer.bias.normal_(0.0, 0.3, generator=g)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.running_mean.normal_(0.0, 0.3, generator=g)
            layer.running_var.uniform_(0.5, 1.5, generator=g)
            layer.weight.normal_(1.0, 0.5, generator=g)  # a few are negative
            layer.bias.normal_(0.0, 0.3, generator=g)
    return model


def images(*shape: int, seed: int = 0) -> Tensor:
    """Return normal noise cut to [-3, 3], float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g).clamp(-3.0, 3.0)
