"""What `docs/migrate.md` says of other libraries, row by row: their call, and ours."""

import importlib
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import lrpfx
from benchmarks.zoos import declare_missing_ops
from lrpfx.composites import EpsilonAll, EpsilonGammaBox, EpsilonPlusFlat


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    return nn.Sequential(*layers).double().eval()


def images() -> Tensor:
    return torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()


SEED = torch.eye(4).double()[[3, 3]]


def by_zennit(composite: Any) -> Tensor:
    from zennit.attribution import Gradient

    with Gradient(net(), composite) as attributor:
        return attributor(images().requires_grad_(), SEED)[1]


def zennit_rows() -> dict[str, Any]:
    import zennit.composites as zc
    import zennit.rules as zr
    from zennit.types import Convolution, Linear

    flat, epsilon = lrpfx.Flat(), lrpfx.Epsilon()
    by_class = [(Convolution, zr.ZPlus()), (Linear, zr.Epsilon())]
    by_name = [(["0"], zr.Flat()), (["4"], zr.Epsilon())]
    first = [(Convolution, zr.WSquare())]
    return {
        "EpsilonPlusFlat": (zc.EpsilonPlusFlat(), "epsilon_plus_flat"),
        "EpsilonGammaBox": (
            zc.EpsilonGammaBox(low=-3.0, high=3.0),
            EpsilonGammaBox(low=-3.0, high=3.0),
        ),
        "LayerMapComposite": (
            zc.LayerMapComposite(by_class),
            [("conv", lrpfx.ZPlus()), "epsilon_plus"],
        ),
        "NameMapComposite": (zc.NameMapComposite(by_name), [("0", flat), ("4", epsilon)]),
        "SpecialFirstLayerMapComposite": (
            zc.SpecialFirstLayerMapComposite(layer_map=by_class, first_map=first),
            [(lrpfx.First(), lrpfx.WSquare()), "epsilon_plus"],
        ),
    }


@pytest.mark.parametrize("row", ["EpsilonPlusFlat", "EpsilonGammaBox", "LayerMapComposite",
                                 "NameMapComposite", "SpecialFirstLayerMapComposite"])  # fmt: skip
def test_a_composite_of_zennit(row: str) -> None:
    theirs, ours = zennit_rows()[row]
    got = lrpfx.explain(net(), images(), SEED, rules=ours).relevance
    torch.testing.assert_close(got, by_zennit(theirs))


def test_a_picture_of_zennit() -> None:
    """As ``imgify(..., symmetric=True)`` indexes its palette, which Pillow no longer takes."""
    from zennit.image import palette

    relevance = lrpfx.explain(net(), images(), 3, rules=EpsilonPlusFlat()).relevance.sum(1)[:1]
    place = (relevance[0] / relevance.abs().max() + 1).numpy() / 2
    theirs = np.asarray(palette("coldnhot")).reshape(256, 3)[(255 * place).astype(np.uint8)]
    ours = np.asarray(lrpfx.figures.mosaic(relevance, cmap="coldnhot").convert("RGB"))
    # Theirs is a shade below; where colours change fastest, a shade is 8 of 255.
    assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 12


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double().eval()


def test_the_calls_of_captum() -> None:
    attr = pytest.importorskip("captum.attr", reason="pip install captum")
    x, model = torch.randn(2, 5).double(), dense()
    theirs, delta = attr.LRP(model).attribute(x, target=3, return_convergence_delta=True)
    ours = lrpfx.explain(model, x, 3, rules=EpsilonAll(1e-9), layers=["0"])
    torch.testing.assert_close(ours.relevance, theirs)
    torch.testing.assert_close(ours.output[:, 3] - ours.relevance.sum(1), delta)
    layer = attr.LayerLRP(model, model[0]).attribute(x, target=3)
    torch.testing.assert_close(ours.layers["0"].relevance, layer)


# -- zennit-crp -----------------------------------------------------------------------------------

CRP = "pip install --no-deps zennit-crp==0.6.0, which names an older zennit"


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.b(self.first(self.a(x)))).flatten(1))


def chain() -> Chain:
    torch.manual_seed(0)
    return Chain().double().eval()


def by_crp(x: Tensor, conditions: Any, **options: Any) -> Any:
    attribution = pytest.importorskip("crp.attribution", reason=CRP)
    from zennit.composites import EpsilonPlus

    attribute = attribution.CondAttribution(chain())
    return attribute(x.clone().requires_grad_(), conditions, EpsilonPlus(), **options)


def of_each_sample(theirs: Tensor, conditions: int) -> Tensor:
    """(N K, ...), as zennit-crp returns it, as (K, N, ...)."""
    return theirs.unflatten(0, (-1, conditions)).transpose(0, 1)


def test_the_conditions_of_zennit_crp() -> None:
    explainer, x = lrpfx.Explainer(chain(), images(), "epsilon_plus"), images()
    conditions = [{"a": [3], "y": [1]}, {"a": [0, 2], "y": [1]}, {"a": [1], "y": [2]}]
    own = [{"a": [3]}, {"a": [0, 2]}, {"a": [1]}]
    ours = explainer(x, target=[1, 1, 2], conditions=own, layers=["a", "b"])
    for parallel in (True, False):
        theirs = by_crp(x, conditions, record_layer=["a", "b"], exclude_parallel=parallel)
        torch.testing.assert_close(ours.relevance.sum(-3), of_each_sample(theirs.heatmap, 3))
        b = of_each_sample(theirs.relevances["b"], 3)
        torch.testing.assert_close(ours.layers["b"].relevance, b)
        a = of_each_sample(theirs.relevances["a"], 3)
        torch.testing.assert_close(ours.layers["a"].passed, a / (2 if parallel else 1))
    paired = explainer(x, target=1, conditions=own[:2], pairing="zip")
    torch.testing.assert_close(paired.relevance.sum(-3), by_crp(x, conditions[:2]).heatmap)


def test_channels_and_inner_starts_of_zennit_crp() -> None:
    concepts = pytest.importorskip("crp.concepts", reason=CRP)
    explainer, x = lrpfx.Explainer(chain(), images(), "epsilon_plus"), images()
    ours = explainer(x, 1, layers=["a"])
    theirs = by_crp(x, [{"y": [1]}], record_layer=["a"])
    channels = concepts.ChannelConcept().attribute(theirs.relevances["a"], abs_norm=False)
    torch.testing.assert_close(ours.concepts("a"), channels)
    for init, seed in (("activation", None), (torch.ones_like, 1)):
        inner = explainer(x, conditions=[{"b": [2]}], start="b", init=init)
        started = by_crp(x, [{"b": [2]}], start_layer="b", init_rel=seed)
        torch.testing.assert_close(inner.relevance[0].sum(1), started.heatmap)


class Labelled(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.rand(16, 1, 6, 6, generator=torch.Generator().manual_seed(2))
        return x[index].double(), index % 3


@pytest.mark.parametrize("best", ["sum", "max"])
def test_references_of_zennit_crp(
    best: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("crp", reason=CRP)
    declare_missing_ops()
    monkeypatch.setattr(np, "int", int, raising=False)  # which it still calls by this name
    from crp.attribution import CondAttribution
    from crp.concepts import ChannelConcept
    from crp.helper import load_maximization
    from crp.visualization import FeatureVisualization
    from zennit.composites import EpsilonPlus

    concept = {"a": ChannelConcept(), "b": ChannelConcept()}
    theirs = FeatureVisualization(
        CondAttribution(chain()), Labelled(), concept, max_target=best, path=str(tmp_path / "fv")
    )
    theirs.run(EpsilonPlus(), 0, 16, batch_size=4)
    explainer = lrpfx.Explainer(chain(), images(), "epsilon_plus")
    options: Any = dict(statistic=best, activation="before", normalize_activation="sample")
    ours = lrpfx.concepts.scan(
        explainer, Labelled(), layers=["a", "b"], out=tmp_path / "s", progress=False, **options
    )
    for layer in "ab":
        for channel in range(4):
            # Of activations lrpfx takes the strongest position only.
            for by, kept in (("relevance", theirs.RelMax), ("activation", theirs.ActMax)):
                if by == "activation" and best == "sum":
                    continue
                samples, scores = (
                    part[:, channel] for part in load_maximization(kept.PATH, layer)[:2]
                )
                found = ours.references(layer, channel, by=by)
                np.testing.assert_allclose([r.score for r in found], scores, atol=1e-6)
                tied = np.isclose(scores[:, None], scores, atol=1e-9).sum(1) > 1
                assert all(
                    r.sample == s for r, s, t in zip(found, samples, tied, strict=True) if not t
                )
            if best == "sum":
                classes, means = theirs.compute_stats(channel, layer)
                assert [c for c, _ in ours.classes(layer, channel)] == classes.tolist()
                got = [mean for _, mean in ours.classes(layer, channel)]
                np.testing.assert_allclose(got, means, atol=1e-6)


# -- LXT ------------------------------------------------------------------------------------------

TOKENS = torch.tensor([[3, 7, 1, 9, 4]])


def language_model(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    small: dict[str, Any] = dict(vocab_size=30, attn_implementation="eager")
    if kind == "llama":
        small |= dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
        small |= dict(num_attention_heads=2, num_key_value_heads=1)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).eval()
    small |= dict(n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).eval()


def by_lxt(kind: str, variant: str) -> tuple[int, Tensor]:
    """The largest token, and its relevance per embedding feature; replaces methods for good."""
    declare_missing_ops()
    models = importlib.import_module(f"lxt.efficient.models.{kind}")
    from lxt.efficient import monkey_patch

    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    monkey_patch(module, getattr(models, variant))
    model = language_model(kind)
    embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
    logits.max().backward()
    return int(logits.argmax()), (embeddings * embeddings.grad).detach()


@pytest.mark.parametrize(
    ("kind", "variant", "rules"),
    [("llama", "attnLRP", "attnlrp"), ("llama", "cp_LRP", "cplrp"), ("gpt2", "cp_LRP", "cplrp")],
)
def test_the_maps_of_lxt(kind: str, variant: str, rules: str) -> None:
    """In a process of its own, as it replaces methods of the classes of transformers."""
    where = "make faithfulness puts it into .venv-lxt"
    pytest.importorskip("lxt", reason=where)
    if not version("transformers").startswith("4.52"):
        pytest.skip(f"LXT needs transformers 4.52: {where}")
    declare_missing_ops()
    with get_context("spawn").Pool(1) as pool:
        token, theirs = pool.apply(by_lxt, (kind, variant))
    given = {"input_ids": TOKENS, "use_cache": False}
    ours = lrpfx.explain(language_model(kind), given, target=(-1, token), rules=rules)
    torch.testing.assert_close(ours.embeddings["input_ids"], theirs, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.relevance["input_ids"], theirs.sum(-1), rtol=1e-4, atol=1e-7)
