"""Two spellings of a network: the relevance must be the same, whatever the rules.

A case is a function as users write it, and its plain twin: both are put between a layer and a
linear head. What it shows is what users of tools that hook modules complain about: functional and
in-place ops, modules used twice, registered in another order, gates, norms and convolutions written
by hand.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lrpfx
from lrpfx import composites
from tests.conftest import Apply
from tests.oracle.models import NIGHTLY

Forward = Callable[[Any, Tensor], Tensor]


#: So small that a division more in one of the spellings cannot be seen.
EPSILON = 1e-18


TOLERANCE = 1e-10


class _Gamma(composites.Named):
    """Gamma on every conv and linear, for models that may lack one of the two."""

    def __init__(self) -> None:
        rule = lrpfx.Gamma(0.25, EPSILON)
        base = composites.AttnLRP(EPSILON).entries
        super().__init__([("conv", rule), ("linear", rule), *base])


RULES = {
    "epsilon_all": composites.EpsilonAll(EPSILON),
    "epsilon_plus": composites.EpsilonPlus(EPSILON, EPSILON),
    "alpha_beta_flat": composites.EpsilonAlpha2Beta1Flat(EPSILON, EPSILON),
    "attnlrp": composites.AttnLRP(EPSILON),
    "gamma": _Gamma(),
    "cplrp": composites.CPLRP(EPSILON),
    "deconvnet": composites.DeconvNet(),
    "beta_smooth": composites.BetaSmooth(),
    "no_bias": composites.EpsilonAlpha2Beta1Flat(EPSILON, EPSILON, zero_params="bias"),
    "w_square": [("conv", lrpfx.WSquare(EPSILON))],
    "flat": [("conv", lrpfx.Flat(EPSILON))],
    "box": [("conv", lrpfx.ZBox(-50.0, 40.0, EPSILON))],
}


#: That see what of an input is zero padding.
FOR_PADDING = ("epsilon_plus", "w_square", "flat", "box")


#: That of ReLUs, and that of activations in general.
FOR_RELUS = ("epsilon_plus", "deconvnet", "beta_smooth")


#: AlphaBeta is made of the two parts of which z-plus has one.
FOR_IMAGES = ("epsilon_all", *["epsilon_plus"] * NIGHTLY, "alpha_beta_flat")


#: Where one of the twins is a conv or linear and the other is none, all rules but Epsilon differ.
LAYERS_DIFFER = ("epsilon_all",)


FOR_ROWS = ("epsilon_all", "gamma")


FOR_TOKENS = ("attnlrp", "gamma")


def normal(*shape: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


@torch.no_grad()
def drawn(module: nn.Module, seed: int = 2) -> Any:
    """The module in float64 and evaluation mode, with nothing left at its initial value."""
    g = torch.Generator().manual_seed(seed)
    for tensor in module.double().eval().parameters():
        tensor.normal_(0.0, 0.6, generator=g)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(generator=g)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0, generator=g)
    return module


def first_leaf(output: Any) -> Tensor:
    return torch.utils._pytree.tree_leaves(output)[0]


def relevance(
    model: nn.Module, inputs: Any, rules: str, ledgers: tuple[bool, ...]
) -> tuple[Any, ...]:
    """Output, and relevance of every input from a seed of normal noise, with a ledger and fast."""
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        output = first_leaf(model(*(a.clone() for a in args)))
    seed = normal(*output.shape, seed=3)
    explainer, found = lrpfx.Explainer(model, inputs, RULES[rules]), []
    for ledger in ledgers:
        e = explainer(inputs, seed, ledger=ledger)
        of = e.relevance if isinstance(e.relevance, tuple) else (e.relevance,)
        found.append([r.detach() for r in of if r is not None])
    return first_leaf(e.output), *found


def assert_same(
    spelled: nn.Module, plain: nn.Module, inputs: Any, rules: tuple[str, ...] = FOR_IMAGES
) -> None:
    """Fail unless both compute the same output, and the same relevance under every rule set."""
    for name in rules:
        out, *ours = relevance(spelled, inputs, name, (True, False))
        expected_out, expected = relevance(plain, inputs, name, (True,))
        assert close(out, expected_out), f"{name}: the twins compute different outputs"
        for found in ours:
            assert len(found) == len(expected)
            for r, e in zip(found, expected, strict=True):
                assert e.abs().max() > 1e-3, "a relevance of zero shows nothing"
                assert close(r, e), f"{name}: relative error {(r - e).norm() / e.norm():.1e}"


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


class Spy:
    """Gives members to a function and remembers which it has asked for."""

    def __init__(self, members: dict[str, Any]) -> None:
        self._members, self.used = {"training": False, **members}, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.used.add(name)
        return self._members[name]


def between(fn: Forward, stem: nn.Module, shape: tuple[int, ...], **members: Any) -> nn.Module:
    """fn between a layer and a linear head, so that dead activations get no relevance.

    Only the members that fn uses are in the model: the others would be traced, too.
    """
    spy = Spy(members)
    with torch.no_grad():
        size = fn(spy, stem(normal(2, *shape))).flatten(1).shape[1]
    used = {name: members[name] for name in members if name in spy.used}
    return Apply(
        lambda m, x: m.head(fn(m, m.stem(x)).flatten(1)),
        stem=stem,
        head=drawn(nn.Linear(size, 3), seed=4),
        **used,
    )


@torch.no_grad()
def _fused_ahead(bn: nn.BatchNorm2d, one: nn.Conv2d) -> nn.Module:
    """The 1 by 1 convolution of a batch norm's output as one convolution, worked out by hand."""
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    shift = bn.bias - bn.running_mean * scale
    fused = nn.Conv2d(4, 4, 1).double()
    fused.weight.copy_(one.weight * scale[:, None, None])
    fused.bias.copy_(one.bias + one.weight[:, :, 0, 0] @ shift)
    return fused


def image_model(fn: Forward) -> nn.Module:
    conv = drawn(nn.Conv2d(4, 4, 3, padding=1), seed=6)
    one = drawn(nn.Conv2d(4, 4, 1), seed=8)
    two = drawn(nn.Conv2d(4, 4, 3, padding=1, bias=False), seed=7)
    bn = drawn(nn.BatchNorm2d(4), seed=12)
    return between(
        fn,
        drawn(nn.Conv2d(2, 4, 3, padding=1), seed=5),
        (2, 6, 6),
        conv=conv,
        two=two,
        bn=bn,
        fused=fuse_conv_bn_eval(conv, bn),
        one=one,
        fused_ahead=_fused_ahead(bn, one),
        fused_two=fuse_conv_bn_eval(two, bn),
        grouped=drawn(nn.Conv2d(4, 4, 3, groups=2), seed=9),
        depthwise=drawn(nn.Conv2d(4, 8, 3, groups=4, bias=False), seed=10),
        up=drawn(nn.ConvTranspose2d(4, 4, 2, stride=2), seed=11),
        bn2=drawn(nn.BatchNorm2d(4), seed=13),
        down=drawn(nn.Linear(4, 2), seed=14),
        grow=drawn(nn.Linear(2, 4), seed=15),
        mask=(normal(4, 4, 3, 3, seed=16) > 0).double(),
        prelu=drawn(nn.PReLU(4), seed=17),
        gn=drawn(nn.GroupNorm(2, 4), seed=18),
    )


def block(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(x)) + x)


def row_model(fn: Forward) -> nn.Module:
    return between(
        fn,
        drawn(nn.Linear(6, 8), seed=5),
        (6,),
        fc=drawn(nn.Linear(8, 8), seed=6),
        two=drawn(nn.Linear(8, 8, bias=False), seed=7),
        slim=drawn(nn.Linear(8, 4), seed=8),
        bilinear=drawn(nn.Bilinear(8, 4, 5, bias=False), seed=9),
        norm=drawn(nn.LayerNorm(8), seed=10),
        rms=drawn(nn.RMSNorm(8, eps=1e-6), seed=11),
        bn=drawn(nn.BatchNorm1d(8), seed=12),
        constant=normal(8, seed=13),
        rnn=drawn(nn.RNNCell(8, 4), seed=14),
        gru=drawn(nn.GRUCell(8, 4), seed=15),
        lstm=drawn(nn.LSTMCell(8, 4), seed=16),
    )


def token_model(fn: Forward) -> nn.Module:
    layer = drawn(nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), seed=11)
    return between(
        fn,
        drawn(nn.Linear(4, 8), seed=5),
        (5, 4),
        q=drawn(nn.Linear(8, 8), seed=6),
        k=drawn(nn.Linear(8, 8), seed=7),
        v=drawn(nn.Linear(8, 8), seed=8),
        out=drawn(nn.Linear(8, 8), seed=9),
        mha=drawn(nn.MultiheadAttention(8, 2, batch_first=True), seed=10),
        late=drawn(nn.MultiheadAttention(8, 2), seed=10),
        layer=layer,
        encoder=nn.TransformerEncoder(layer, 1).eval(),
        pre=drawn(nn.TransformerEncoderLayer(8, 2, 6, norm_first=True, batch_first=True), seed=11),
        heads=normal(2, 4, 3, seed=12),
    )


def layers() -> dict[str, Any]:
    """Two convolutions and a head, the same at every call."""
    return dict(
        first=drawn(nn.Conv2d(2, 4, 3, padding=1), seed=5),
        second=drawn(nn.Conv2d(4, 4, 3, padding=1), seed=6),
        head=drawn(nn.Linear(4, 3), seed=7),
    )


def net(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.first(x))
    y = F.relu(m.second(y) + y)
    return m.head(y.mean((2, 3)))


def plain_net() -> nn.Module:
    return Apply(net, **layers())


#: The spelling, its plain twin, and the rules that both are held to if others than usual.
Case = tuple[Any, ...]


def assert_images_agree(
    spelled: Forward, plain: Forward, rules: tuple[str, ...] = FOR_IMAGES
) -> None:
    assert_same(image_model(spelled), image_model(plain), normal(2, 2, 6, 6), rules)


def assert_rows_agree(spelled: Forward, plain: Forward, rules: tuple[str, ...] = FOR_ROWS) -> None:
    assert_same(row_model(spelled), row_model(plain), normal(3, 6), rules)


def assert_tokens_agree(
    spelled: Forward, plain: Forward, rules: tuple[str, ...] = FOR_TOKENS
) -> None:
    assert_same(token_model(spelled), token_model(plain), normal(2, 5, 4), rules)
