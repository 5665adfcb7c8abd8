"""Small models of Hugging Face's families with random weights, and what their tests share."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lrpfx
from lrpfx.composites import CPLRP, AttnLRP, Composite, MambaLRP
from tests.conftest import Traces, traced_once
from tests.oracle import zoo
from tests.oracle.models import NIGHTLY

TOKENS, VOCABULARY = 7, 50
SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
)
TEXT = dict(SIZES, vocab_size=VOCABULARY, max_position_embeddings=16)
ENDS = dict(bos_token_id=0, eos_token_id=0)
GROUPED = dict(TEXT, num_key_value_heads=2)  # two queries share a key, so keys are broadcast
HEADS = dict(GROUPED, head_dim=8)
ONE = dict(num_hidden_layers=1)  # time is spent on capture; Llama and BERT have two
GPT2 = dict(n_embd=32, n_layer=1, n_head=4, vocab_size=VOCABULARY, n_positions=16)
DISTILBERT = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=VOCABULARY)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="batched_mm")
OPT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=64,
    vocab_size=VOCABULARY,
    max_position_embeddings=16,
    word_embed_proj_dim=32,
)
MAMBA = dict(hidden_size=32, num_hidden_layers=1, vocab_size=VOCABULARY, state_size=4, expand=2)
T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=VOCABULARY)
IMAGES = dict(image_size=32, patch_size=8, **SIZES)
SWIN = dict(image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4)
CLIP = dict(
    text_config=dict(TEXT | ONE, bos_token_id=0, eos_token_id=VOCABULARY - 1),
    vision_config=IMAGES | ONE,
    projection_dim=16,
)

CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**HEADS)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(sliding_window=4, **GROUPED)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED | EXPERTS | ONE)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**HEADS)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(query_pre_attn_scalar=8, **HEADS | ONE)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(pad_token_id=0, **ENDS | GROUPED | ONE)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**ENDS, **GPT2)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT | ONE)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT)),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**MAMBA)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(decoder_start_token_id=0, **T5)),
}
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**TEXT | ONE)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**DISTILBERT)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGES | ONE)),
    "swin": lambda: tf.SwinForImageClassification(tf.SwinConfig(**SWIN)),
}
CONTRASTIVE: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: tf.CLIPModel(tf.CLIPConfig(**CLIP)),
}
FAMILIES = CAUSAL | CLASSIFIERS | CONTRASTIVE
# Mamba's scan is unrolled, images have one size, and CLIP has images.
OF_ANY_LENGTH = [family for family in FAMILIES if family not in ("mamba", "vit", "swin", "clip")]
#: Without fused attention: soft-capped scores, no attention at all.
EAGER_ONLY = ("gemma2", "mamba")
#: Whose ops are those of another family: their tests run in ``make nightly`` only.
KIN = {"qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt_neox", "opt", "roberta", "distilbert"}
KIN |= {"swin"}


#: Not exported, as if with eager attention: programs of Llama, T5, Mamba, BERT, ViT and CLIP are.
RECORDED = () if NIGHTLY else ("mixtral", "gemma2", "gpt2")
#: Whose eager attention is that of Llama, BERT or T5.
EAGER_AS_OTHERS = {"mixtral", "gpt2", "vit", "clip"}


def marked(family: str, *others: str, of: str = "") -> Any:
    """A case of a family, and what else it is of; ``of`` is an attention that it needs besides."""
    nightly = family in KIN or ("eager" in (*others, of) and family in EAGER_AS_OTHERS)
    return pytest.param(family, *others, marks=[pytest.mark.nightly] if nightly else [])


def both(*families: str) -> pytest.MarkDecorator:
    """Cases of families, each with eager and with fused attention."""
    cases = [marked(f, implementation) for f in families for implementation in ("eager", "sdpa")]
    return pytest.mark.parametrize(("family", "implementation"), cases)


IMPLEMENTED = [
    marked(family, implementation)
    for family in FAMILIES
    for implementation in ("eager", "sdpa")
    if implementation == "eager" or family not in EAGER_ONLY
]

RULES: dict[str, Composite] = {
    "attnlrp": AttnLRP(epsilon=1e-12),
    "cplrp, gate stop": CPLRP(epsilon=1e-12, gate="stop"),
    "cplrp, gate uniform": CPLRP(epsilon=1e-12, gate="uniform"),
    "mambalrp": MambaLRP(epsilon=1e-12),
}

families = pytest.mark.parametrize("family", [marked(f) for f in FAMILIES])
implemented = pytest.mark.parametrize(("family", "implementation"), IMPLEMENTED)


def best(family: str) -> str:
    """Return the attention that transformers would pick."""
    return "eager" if family in EAGER_ONLY else "sdpa"


def model_of(family: str, implementation: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return the model of a family; its parameters are the same whatever attention and dtype."""
    return _model_of(family, implementation, dtype)


@functools.cache
def _model_of(family: str, implementation: str, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = FAMILIES[family]()
        draw(model)
    if family not in EAGER_ONLY:
        model.set_attn_implementation(implementation)
    return model.to(dtype).eval()


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Draw parameters that let every part matter.

    As initialised, attention is all but uniform, biases are zero and norms scale by one: a rule
    that forgets any of them would go unseen.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif "emb" in name or "wte" in name or "wpe" in name or "shared" in name:
            parameter.normal_()
        elif "experts" in name:  # all experts are one parameter
            parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
        elif parameter.ndim > 1:
            parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)


_TRACES: Traces = {}


def explainer_of(
    family: str, implementation: str, rules: str, dtype: torch.dtype = torch.float64
) -> lrpfx.Explainer:
    """Return an Explainer; those with the best attention are exported and take any length."""
    return _explainer_of(family, implementation, rules, dtype)


@functools.cache
def _explainer_of(
    family: str, implementation: str, rules: str, dtype: torch.dtype
) -> lrpfx.Explainer:
    model = model_of(family, implementation, dtype)
    inputs = inputs_of(family, dtype=dtype)
    if implementation != best(family) or family in RECORDED:
        return lrpfx.Explainer(model, inputs, RULES[rules], capture="record")
    with traced_once(_TRACES):
        dynamic = (1,) if family in OF_ANY_LENGTH else ()
        return lrpfx.Explainer(model, inputs, RULES[rules], dynamic=dynamic)


def explained(
    family: str, implementation: str, rules: str, dtype: torch.dtype = torch.float64
) -> lrpfx.Explanation:
    return _explained(family, implementation, rules, dtype)


@functools.cache
def _explained(
    family: str, implementation: str, rules: str, dtype: torch.dtype
) -> lrpfx.Explanation:
    explainer = explainer_of(family, implementation, rules, dtype)
    explanation = explainer(inputs_of(family, dtype=dtype), target_of(family))
    assert explanation.report.absorbed is not None  # now: other tests write into shared parameters
    return explanation


def inputs_of(
    family: str, n: int = 2, tokens: int = TOKENS, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Return token ids and a mask, or images; every second sentence has two tokens masked.

    They are in the middle, so that the last token of a causal model is in the sentence and no
    token is left without any to attend to: transformers makes NaN of such rows in float64.
    """
    images = dict(pixel_values=zoo.images(n, 3, 32, 32).to(dtype))
    if family in ("vit", "swin"):
        return images
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (n, tokens), generator=g)
    mask = torch.ones_like(ids)
    mask[1::2, 2:4] = 0
    inputs = dict(input_ids=ids, attention_mask=mask)
    if family == "roberta":
        ids[ids == 1] = 2  # the id of padding, which has no position
    if family == "t5":
        inputs |= dict(decoder_input_ids=torch.randint(0, VOCABULARY, (n, tokens), generator=g))
    if family == "clip":
        ids[:, -1] = VOCABULARY - 1  # the end, where the text is read out
        inputs |= images
    return dict(inputs, use_cache=False) if family in CAUSAL else inputs


def sample(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    return {key: v[i : i + 1] if isinstance(v, Tensor) else v for key, v in inputs.items()}


def target_of(family: str) -> Callable[[Any], Tensor]:
    if family in CAUSAL:
        return lambda output: output.logits[:, -1, 7]
    if family in CONTRASTIVE:  # each image with the text of its own sample
        return lambda output: output.logits_per_image.diagonal()
    return lambda output: output.logits[:, 1]


def relevance_of(explanation: lrpfx.Explanation) -> Tensor:
    """Return the relevance of the explained inputs, which come first, or flat side by side."""
    parts = [r for r in explanation.relevance.values() if isinstance(r, Tensor)]
    return parts[0] if len(parts) == 1 else torch.cat([r.flatten(1) for r in parts], 1)


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a sample, in the Euclidean norm."""
    assert got.shape == expected.shape and got.isfinite().all()
    norms = expected.flatten(1).norm(dim=1)
    assert (norms > 0).all()
    return float(((got - expected).flatten(1).norm(dim=1) / norms).max())


def assert_closes(report: lrpfx.explanation.Report) -> None:
    """Check that what started has reached the inputs or is booked as absorbed."""
    assert report.started is not None and report.reached is not None
    assert report.unaccounted is not None
    moved = [abs(report.started), *(abs(row.relevance_in or 0.0) for row in report.rows)]
    assert abs(report.unaccounted) < 1e-6 * max(moved)
    left = report.started - report.reached - sum(report.absorbed.values())
    assert left == pytest.approx(report.unaccounted, abs=1e-12 * max(moved))
