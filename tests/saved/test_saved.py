"""An Explainer that is pickled, copied, or saved to a file, explains as it did."""

import copy
import json
import multiprocessing
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lrpfx
from lrpfx import composites, errors
from tests.conftest import assert_untouched

RAN: list[str] = []


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return (self.up(x) if float(x.sum()) > 0 else self.down(x)) * scale


def net(width: int = 4) -> Net:
    torch.manual_seed(width)
    model = Net(width).eval()
    model.norm.running_mean.normal_()
    return model


def images(n: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(n, 1, 6, 6)


def pickled(explainer: lrpfx.Explainer, path: Path) -> lrpfx.Explainer:
    return pickle.loads(pickle.dumps(explainer))


def copied(explainer: lrpfx.Explainer, path: Path) -> lrpfx.Explainer:
    return copy.deepcopy(explainer)


def filed(explainer: lrpfx.Explainer, path: Path) -> lrpfx.Explainer:
    explainer.save(path / "e.lrpfx")
    return lrpfx.Explainer.load(path / "e.lrpfx", explainer.model)


WAYS = [pickled, copied, filed]
Way = Callable[[lrpfx.Explainer, Path], lrpfx.Explainer]


@pytest.mark.parametrize("way", WAYS)
def test_what_was_kept_explains_other_batches_as_before(way: Way, tmp_path: Path) -> None:
    model = net()
    rules = [
        (("norm", nn.Linear), lrpfx.Epsilon(lrpfx.Stabilizer(0.1, clip=True))),
        (lrpfx.First(), lrpfx.ZBox(torch.zeros(1, 6, 6), 1.0)),
        composites.EpsilonPlusFlat(epsilon=0.01),
    ]
    explainer = lrpfx.Explainer(model, images(2), rules)
    x = images(5)
    with assert_untouched(model):
        again = way(explainer, tmp_path)
    then, now = explainer(x, 1), again(x, 1)
    assert torch.equal(then.relevance, now.relevance)
    assert str(then.report.planned()) == str(now.report.planned())
    assert (again.model is model) is (way is filed)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.score, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, src: Tensor) -> Tensor:
        return self.head((self.score(src) @ src.mT).softmax(-1) @ self.value(src))


@pytest.mark.parametrize("way", WAYS)
def test_options_are_kept(way: Way, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    explainer = lrpfx.Explainer(model, {"src": torch.rand(2, 3, 4)}, "cplrp", dynamic=(1,))
    again = way(explainer, tmp_path)
    x = {"src": torch.rand(1, 7, 4)}  # another number of tokens
    torch.testing.assert_close(
        again(x, (0, 1)).relevance["src"], explainer(x, (0, 1)).relevance["src"]
    )


@pytest.mark.parametrize("way", WAYS)
def test_recorded_runs_and_constants_among_inputs_are_kept(way: Way, tmp_path: Path) -> None:
    explainer = lrpfx.Explainer(Branching().eval(), (torch.ones(2, 3), 2.0))
    again = way(explainer, tmp_path)
    for x in ((torch.ones(2, 3), 2.0), (-torch.ones(1, 3), 0.5)):
        assert torch.equal(again(x, 1).relevance[0], explainer(x, 1).relevance[0])


@pytest.mark.parametrize("way", WAYS)
def test_it_is_made_again_in_the_mode_it_was_made_in(way: Way, tmp_path: Path) -> None:
    explainer = lrpfx.Explainer(net(), images())
    explainer.model.train()
    again = way(explainer, tmp_path)
    assert again.model.training and again.model.norm.training
    assert torch.equal(again(images(), 0).relevance, explainer(images(), 0).relevance)


def test_a_copy_explains_the_copy_of_its_model() -> None:
    model = net()
    explainer = lrpfx.Explainer(model, images())
    other, again = copy.deepcopy((model, explainer))
    assert again.model is other and other is not model
    before = again(images(), 0).relevance
    with torch.no_grad():
        model.conv.weight.zero_()
    assert torch.equal(again(images(), 0).relevance, before)
    assert copy.copy(explainer).model is model


class Maps(Dataset[Tensor]):
    """Explains in the process that it is asked in."""

    def __init__(self, explainer: lrpfx.Explainer) -> None:
        self.explainer = explainer

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        torch.set_num_threads(1)
        return self.explainer(images(4)[[i]], 1).relevance[0]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.nightly)])
def test_workers_of_a_loader_explain(start: str) -> None:
    explainer = lrpfx.Explainer(net(), images())
    context = multiprocessing.get_context(start)
    loader = DataLoader(
        Maps(explainer), batch_size=2, num_workers=1, multiprocessing_context=context
    )
    found = torch.cat(list(loader))
    torch.testing.assert_close(found, explainer(images(4), 1).relevance)


# -- files ----------------------------------------------------------------------------------------


def saved(tmp_path: Path, weights: bool = False) -> Path:
    path = tmp_path / "e.lrpfx"
    lrpfx.Explainer(net(), images(), "epsilon_plus").save(path, weights=weights)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path: Path, **changed: Any) -> Path:
    """The file with entries of its JSON changed."""
    content = members(path)
    about = json.loads(content["explainer.json"]) | changed
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (content | {"explainer.json": json.dumps(about).encode()}).items():
            archive.writestr(name, data)
    return path


def test_a_file_holds_two_samples_and_no_weights_unless_asked_for(tmp_path: Path) -> None:
    from safetensors.torch import load

    content = members(saved(tmp_path))
    assert set(content) == {"explainer.json", "tensors.safetensors"}
    assert load(content["tensors.safetensors"])["inputs"].shape == (2, 1, 6, 6)
    content = members(saved(tmp_path, weights=True))
    assert set(load(content["weights.safetensors"])) == set(net().state_dict())


def test_another_models_weights_are_refused_by_name(tmp_path: Path) -> None:
    path, other = saved(tmp_path), net()
    with torch.no_grad():
        other.head.bias.add_(1)
    with assert_untouched(other), pytest.raises(errors.InputError, match="1 of 9(.|\n)*head.bias"):
        lrpfx.Explainer.load(path, other)
    with pytest.raises(errors.InputError, match=r"conv.weight: float32\[5, 1, 3, 3\], saved as"):
        lrpfx.Explainer.load(path, net(5))
    other.extra = nn.Linear(1, 1)
    del other.head
    with pytest.raises(errors.InputError) as caught:
        lrpfx.Explainer.load(path, other, weights="model")
    assert "head.weight: is not in this model" in str(caught.value)
    assert "extra.weight: is not in the file" in str(caught.value)


def test_weights_are_written_into_a_model_only_if_told(tmp_path: Path) -> None:
    path, fresh = saved(tmp_path, weights=True), Net().eval()
    with pytest.raises(errors.InputError, match='weights="file"'):
        lrpfx.Explainer.load(path, fresh)
    as_it_is = lrpfx.Explainer.load(path, fresh, weights="model")
    torch.testing.assert_close(as_it_is(images()).output, fresh(images()).detach())
    loaded = lrpfx.Explainer.load(path, fresh, weights="file")
    torch.testing.assert_close(loaded(images()).output, net()(images()).detach())
    assert torch.equal(fresh.conv.weight, net().conv.weight)
    with pytest.raises(errors.InputError, match="no Explainer with weights"):
        lrpfx.Explainer.load(saved(tmp_path), fresh, weights="file")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
        model[2].weight = model[0].weight
        return model

    explainer, fresh = lrpfx.Explainer(tied(), torch.ones(2, 3)), tied()
    explainer.save(tmp_path / "e.lrpfx", weights=True)
    again = lrpfx.Explainer.load(tmp_path / "e.lrpfx", fresh, weights="file")
    assert fresh[2].weight is fresh[0].weight
    assert torch.equal(again(torch.ones(1, 3)).relevance, explainer(torch.ones(1, 3)).relevance)


class OwnRule(lrpfx.Epsilon):
    """Somebody's own."""


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ([(lambda node: node.kind == "linear", lrpfx.Epsilon())], "lambda"),
        ([("conv", OwnRule())], "OwnRule"),
        ([("conv", lrpfx.Epsilon(lambda z: z + 1.0))], "lambda"),
    ],
    ids=["selector", "rule", "stabilizer"],
)
def test_code_of_ones_own_is_refused_by_name(tmp_path: Path, rules: Any, named: str) -> None:
    explainer = lrpfx.Explainer(net(), images(), rules)
    with pytest.raises(errors.InputError, match=f"{named}.*is code of your own"):
        explainer.save(tmp_path / "e.lrpfx")
    path = saved(tmp_path)
    again = lrpfx.Explainer.load(path, explainer.model, rules=rules)
    assert torch.equal(again(images(), 1).relevance, explainer(images(), 1).relevance)


class Payload:
    """Unpickling it is noticed."""

    def __reduce__(self) -> Any:
        return RAN.append, ("code of a file",)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: pickle.dumps(Payload()), id="pickle"),
        pytest.param(lambda: b"", id="empty"),
        pytest.param(lambda: b"PK\x03\x04" + bytes(50), id="broken zip"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Callable[[], bytes]) -> None:
    path = tmp_path / "e.lrpfx"
    path.write_bytes(content())
    for weights in ("same", "file", "model"):
        with pytest.raises(errors.InputError, match="holds no Explainer"):
            lrpfx.Explainer.load(path, net(), weights=weights)
    with pytest.raises(errors.InputError, match="holds no Explainer"):
        lrpfx.Explainer.load(tmp_path / "missing.lrpfx", net())
    assert not RAN


@pytest.mark.parametrize("member", ["explainer.json", "tensors.safetensors", "weights.safetensors"])
def test_pickled_members_are_refused(tmp_path: Path, member: str) -> None:
    path = saved(tmp_path, weights=True)
    content = members(path) | {member: pickle.dumps(Payload())}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(errors.InputError, match="holds no Explainer"):
        lrpfx.Explainer.load(path, net(), weights="file")
    assert not RAN


def test_files_of_later_formats_and_names_of_other_code_are_refused(tmp_path: Path) -> None:
    path = rewritten(saved(tmp_path), format=99, lrpfx="9.0")
    with pytest.raises(errors.InputError, match="format 99, written by lrpfx 9.0"):
        lrpfx.Explainer.load(path, net())
    for rules in ({"class": "os.system", "fields": {}}, {"predicate": "exec"}, {"composite": "X"}):
        path = rewritten(saved(tmp_path), rules=rules)
        with pytest.raises(errors.InputError, match="there is no '(os.system|exec|X)'"):
            lrpfx.Explainer.load(path, net())
    path = rewritten(saved(tmp_path), rules=[[{"module": "os.PathLike"}, None]])
    with pytest.raises(errors.SelectorError, match="no module of the model is a os.PathLike"):
        lrpfx.Explainer.load(path, net())


def test_without_safetensors_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"lrpfx\[save\]"):
        saved(tmp_path)
