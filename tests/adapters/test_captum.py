"""captum's own callers around lrpfx: shapes, targets, tuples, NoiseTunnel, metrics, layers."""

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import errors
from tests.conftest import Apply, assert_untouched

captum = pytest.importorskip("captum", reason="pip install 'lrpfx[captum]'")

from captum import attr  # noqa: E402
from captum.metrics import infidelity, sensitivity_max  # noqa: E402

from lrpfx.adapters.captum import LRP, LayerLRP  # noqa: E402


class Plain(nn.ModuleList):
    """What captum's own LRP explains, too: modules in a row, none used twice."""

    def __init__(self) -> None:
        super().__init__([nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Linear(48, 6), nn.ReLU()])
        self.append(nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x if isinstance(module, (nn.Conv2d, nn.ReLU)) else x.flatten(1))
        return x


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor, scale: Tensor, power: int = 1) -> Tensor:
        h = torch.relu(self.a(a) + self.b(b)) * scale
        return self.head(h + h.relu()) ** power


def model() -> nn.Module:
    torch.manual_seed(0)
    return Plain().eval()


def images(n: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, 1, 6, 6)


def rules() -> list[tuple[str, lrpfx.Rule]]:
    return [("*", lrpfx.Epsilon(1e-9)), ("activation", lrpfx.Pass())]


def as_captum_has_it(net: nn.Module) -> nn.Module:
    for module in net:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.rule = attr._utils.lrp_rules.EpsilonRule(1e-9)
    return net


@pytest.mark.parametrize("target", [2, [0, 1, 3], torch.tensor([0, 1, 3]), torch.tensor(2), (2,)])
def test_relevance_and_delta_are_captums_where_it_has_them(target: object) -> None:
    net, x = model(), images()
    theirs = attr.LRP(as_captum_has_it(model())).attribute(
        x, target=target, return_convergence_delta=True
    )
    with assert_untouched(net):
        ours = LRP(net, rules()).attribute(x, target=target, return_convergence_delta=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("which", [0, 4, [2, 4]])
@pytest.mark.parametrize("entering", [False, True])
def test_relevance_of_layers_is_captums_where_it_has_it(which: object, entering: bool) -> None:
    net, other, x = model(), as_captum_has_it(model()), images()
    several = isinstance(which, list)
    pick = (lambda m: [m[i] for i in which]) if several else (lambda m: m[which])
    options = {"target": 1, "attribute_to_layer_input": entering, "return_convergence_delta": True}
    theirs = attr.LayerLRP(other, pick(other)).attribute(x, **options)
    with assert_untouched(net):
        ours = LayerLRP(net, pick(net), rules()).attribute(x, **options)
    pair = (ours[0], theirs[0]) if several else ([ours[0]], [theirs[0]])
    for mine, one in zip(*pair, strict=True):
        one = one[0] if isinstance(one, tuple) else one
        torch.testing.assert_close(mine, one.detach(), rtol=1e-3, atol=1e-5)


def test_tuples_of_inputs_and_further_arguments() -> None:
    torch.manual_seed(0)
    net, given = Both().eval(), (torch.randn(5, 3), torch.randn(5, 2))
    scale = torch.rand(5, 1)
    found = LRP(net, "epsilon_plus").attribute(
        given, target=1, additional_forward_args=(scale, 1), return_convergence_delta=True
    )
    plain = lrpfx.explain(net, (*given, scale, 1), 1, rules="epsilon_plus", wrt=(0, 1))
    (a, b), delta = found
    torch.testing.assert_close((a, b), plain.relevance[:2])
    torch.testing.assert_close(delta, plain.absorbed, rtol=1e-4, atol=1e-5)


def test_targets_per_sample_and_none() -> None:
    net = nn.Conv2d(1, 2, 3, padding=1).eval()
    x, where = images(2), [(0, 1, 2), (1, 3, 3)]
    found = LRP(net).attribute(x, target=where)
    plain = lrpfx.explain(net, x, lambda out: torch.stack([out[0, 0, 1, 2], out[1, 1, 3, 3]]))
    torch.testing.assert_close(found, plain.relevance)
    one = nn.Sequential(nn.Flatten(), nn.Linear(36, 1)).eval()
    torch.testing.assert_close(LRP(one).attribute(x), lrpfx.explain(one, x, 0).relevance)
    with pytest.raises(errors.TargetError, match="a target is needed"):
        LRP(model()).attribute(images())


def test_noise_tunnel_goes_around_it() -> None:
    method, x = LRP(model(), "epsilon_plus"), images()
    tunnel = attr.NoiseTunnel(method)
    found, delta = tunnel.attribute(
        x, nt_samples=4, stdevs=0.0, target=1, return_convergence_delta=True
    )
    torch.testing.assert_close(found, method.attribute(x, target=1))
    assert delta.shape == (12,)
    noisy = tunnel.attribute(x, nt_samples=4, nt_type="vargrad", stdevs=0.1, target=[0, 1, 2])
    assert noisy.shape == x.shape and noisy.abs().sum() > 0


def test_metrics_take_it() -> None:
    net, x = model(), images()
    method = LRP(net, rules())
    maps = method.attribute(x, target=1)

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = 0.01 * torch.randn_like(inputs)
        return noise, inputs - noise

    assert infidelity(net, perturb, x, maps, target=1).shape == (3,)
    found = sensitivity_max(method.attribute, x, target=1, n_perturb_samples=2)
    assert found.shape == (3,) and bool((found >= 0).all())


def test_live_weights_are_read() -> None:
    net, x = model(), images()
    method, layer = LRP(net), LayerLRP(net, net[2])
    before = method.attribute(x, target=1), layer.attribute(x, 1, attribute_to_layer_input=True)
    with torch.no_grad():
        net[4].weight.mul_(2)
        net[4].bias.mul_(2)
    after = method.attribute(x, target=1), layer.attribute(x, 1, attribute_to_layer_input=True)
    torch.testing.assert_close(after, tuple(2 * r for r in before), rtol=1e-3, atol=1e-5)


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        return self.head(self.fc(h) + h)


def test_what_enters_a_layer_is_its_own_share() -> None:
    """Of a tensor that a skip connection reads, too."""
    torch.manual_seed(0)
    net, x = Skips().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    found = LayerLRP(net, net.fc, lrpfx.composites.EpsilonAll(0.0)).attribute(
        x, 1, attribute_to_layer_input=True
    )
    h = 2 * x
    expected = h * (net.head.weight[1] @ net.fc.weight)  # gradient times input of that branch
    total = (net.fc(h) + h) @ net.head.weight[1] + net.head.bias[1]
    through = lrpfx.explain(net, x, 1, rules="epsilon_all", layers=["fc"]).layers["fc"].relevance
    assert found.shape == (3, 4) and total.shape == (3,)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-8)
    bias = (net.fc.bias * net.head.weight[1]).sum()
    torch.testing.assert_close(found.sum(1) + bias, through.sum(1), rtol=1e-4, atol=1e-5)


def test_rules_by_path_find_their_layers() -> None:
    net, x = model(), images()
    own = [("4", lrpfx.Gamma(0.5)), ("2", lrpfx.ZPlus()), "epsilon_all"]
    plain = lrpfx.explain(net, x, 1, rules=own, layers=["2"])
    for entering, expected in ((False, plain.layers["2"].relevance), (True, None)):
        found = LayerLRP(net, net[2], own).attribute(x, 1, attribute_to_layer_input=entering)
        assert found.shape == ((3, 48) if entering else (3, 6))
        if expected is not None:
            torch.testing.assert_close(found, expected)


def test_layers_that_are_called_twice_or_not_of_the_model_are_refused() -> None:
    twice = nn.Linear(4, 4)
    net = nn.Sequential(twice, nn.ReLU(), twice).eval()
    with pytest.raises(errors.InputError, match="0 and 2 is called several times"):
        LayerLRP(net, twice)
    again = Apply(lambda self, x: self.fc(self.fc(x).relu()), fc=twice)
    for entering in (False, True):
        with pytest.raises(errors.InputError, match="fc is called several times"):
            LayerLRP(again, twice).attribute(
                torch.randn(2, 4), 1, attribute_to_layer_input=entering
            )
    with pytest.raises(errors.InputError, match="Linear is no module of the model"):
        LayerLRP(net, nn.Linear(1, 1))
