"""The models that ``benchmarks.coverage`` measures, each with inputs of a size that runs soon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model, and inputs for it.

    Args:
        name: In the table.
        make: Builds it, with random weights.
        inputs: Draws inputs for n samples: a tensor, a tuple, or a dict.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]


def images(*shape: int) -> Callable[[int], Tensor]:
    """Normal noise of shape (n, *shape)."""
    return lambda n: torch.randn(n, *shape)


# -- torchvision ----------------------------------------------------------------------------------

#: Side of the images, by the first name that the model's begins with; 64 elsewhere.
SIDES = {"vit_h_14": 518, "vit": 224, "swin": 64, "maxvit": 224, "inception": 96, "alexnet": 96}

#: Videos: (channels, frames, height, width), 8 frames of 64 x 64 elsewhere.
VIDEOS = {"mvit": (3, 16, 224, 224), "s3d": (3, 16, 64, 64)}

DETECTORS = ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"]
DETECTORS += ["fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn"]
DETECTORS += ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn"]
DETECTORS += ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"]
DETECTORS += ["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"]


def declare_missing_ops() -> None:
    """torchvision's wheel needs two ops of its own that a CPU build of torch does not load."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def torchvision_cases() -> Iterator[Case]:
    """All models for classification, segmentation, video, flow; the backbones of detectors."""
    declare_missing_ops()
    from torchvision import models

    def build(name: str, **options: Any) -> nn.Module:
        return models.get_model(name, weights=None, **options)

    for name in models.list_models(module=models):
        side = next((s for start, s in SIDES.items() if name.startswith(start)), 64)
        yield Case(name, partial(build, name), images(3, side, side))
    for name in models.list_models(module=models.segmentation):
        yield Case(name, partial(build, name, weights_backbone=None), images(3, 64, 64))
    for name in models.list_models(module=models.video):
        shape = next((s for start, s in VIDEOS.items() if name.startswith(start)), (3, 8, 64, 64))
        yield Case(name, partial(build, name), images(*shape))
    for name in models.list_models(module=models.optical_flow):
        yield Case(name, partial(build, name), two_frames)
    for name in DETECTORS:
        yield Case(f"{name}, backbone", partial(_backbone, build, name), images(3, 64, 64))


def two_frames(n: int) -> tuple[Any, ...]:
    """Two images and the number of refinements, as optical flow takes them."""
    return torch.randn(n, 3, 128, 128), torch.randn(n, 3, 128, 128), 2


def _backbone(build: Callable[..., nn.Module], name: str) -> nn.Module:
    backbone = build(name, weights_backbone=None).backbone
    assert isinstance(backbone, nn.Module)
    return backbone


# -- transformers ---------------------------------------------------------------------------------

TOKENS, VOCABULARY = 7, 60
_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
_TEXT = dict(_SIZES, vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=0)
_GROUPED = dict(_TEXT, num_key_value_heads=2, head_dim=8)
_GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=32)
_BART = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    pad_token_id=0,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=32,
)
_T5 = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
_MOE = dict(num_experts_per_tok=2)
_IMAGES = dict(_SIZES, image_size=32, patch_size=8)
_SPEECH = dict(
    _SIZES,
    vocab_size=VOCABULARY,
    conv_dim=(16, 16),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    num_feat_extract_layers=2,
)
_STAGES = dict(depths=[1, 1, 1, 1], num_channels=3)
_TOWER = dict(_TEXT, projection_dim=16)
_TOWERS = dict(
    text_config=dict(_TOWER, eos_token_id=VOCABULARY - 1, bos_token_id=1),
    vision_config=dict(_IMAGES, projection_dim=16),
)

#: Model type -> auto class, what inputs it takes, sizes. A tenth to a tenth of a thousandth of
#: what is published; every part that the type has is there.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("CausalLM", "causal", _GROUPED),
    "qwen2": ("CausalLM", "causal", _GROUPED),
    "qwen3": ("CausalLM", "causal", _GROUPED),
    "mistral": ("CausalLM", "causal", _GROUPED),
    "gemma": ("CausalLM", "causal", _GROUPED),
    "gemma2": ("CausalLM", "causal", _GROUPED),
    "gemma3_text": ("CausalLM", "causal", _GROUPED),
    "phi": ("CausalLM", "causal", _TEXT),
    "phi3": ("CausalLM", "causal", _TEXT),
    "gpt2": ("CausalLM", "causal", _GPT2),
    "gpt_neo": (
        "CausalLM",
        "causal",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            attention_types=[[["global", "local"], 1]],
        ),
    ),
    "gpt_neox": ("CausalLM", "causal", _TEXT),
    "gptj": ("CausalLM", "causal", dict(_GPT2, rotary_dim=4)),
    "codegen": ("CausalLM", "causal", dict(_GPT2, rotary_dim=4)),
    "opt": ("CausalLM", "causal", dict(_TEXT, ffn_dim=64, word_embed_proj_dim=32)),
    "bloom": (
        "CausalLM",
        "causal",
        dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    ),
    "mpt": (
        "CausalLM",
        "causal",
        dict(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=32),
    ),
    "falcon": ("CausalLM", "causal", _TEXT),
    "olmo": ("CausalLM", "causal", _TEXT),
    "olmo2": ("CausalLM", "causal", _TEXT),
    "stablelm": ("CausalLM", "causal", dict(_TEXT, num_key_value_heads=2)),
    "starcoder2": ("CausalLM", "causal", dict(_TEXT, num_key_value_heads=2)),
    "cohere": ("CausalLM", "causal", dict(_TEXT, num_key_value_heads=2)),
    "granite": ("CausalLM", "causal", dict(_TEXT, num_key_value_heads=2)),
    "smollm3": ("CausalLM", "causal", dict(_TEXT, num_key_value_heads=2)),
    "mixtral": ("CausalLM", "causal", dict(_GROUPED, **_MOE, num_local_experts=4)),
    "qwen2_moe": (
        "CausalLM",
        "causal",
        dict(
            _TEXT,
            **_MOE,
            num_experts=4,
            num_key_value_heads=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=32,
        ),
    ),
    "mamba": (
        "CausalLM",
        "recurrent",
        dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8),
    ),
    "bert": ("SequenceClassification", "text", _TEXT),
    "roberta": ("SequenceClassification", "text", _TEXT),
    "xlm-roberta": ("SequenceClassification", "text", _TEXT),
    "distilbert": (
        "SequenceClassification",
        "text",
        dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=VOCABULARY),
    ),
    "electra": ("SequenceClassification", "text", dict(_TEXT, embedding_size=16)),
    "albert": ("SequenceClassification", "text", dict(_TEXT, embedding_size=16)),
    "deberta": (
        "SequenceClassification",
        "text",
        dict(
            _TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16
        ),
    ),
    "deberta-v2": (
        "SequenceClassification",
        "text",
        dict(_TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    ),
    "mpnet": ("SequenceClassification", "text", _TEXT),
    "modernbert": ("SequenceClassification", "text", _TEXT),
    "roformer": ("SequenceClassification", "text", dict(_TEXT, embedding_size=32)),
    "ernie": ("SequenceClassification", "text", _TEXT),
    "squeezebert": ("SequenceClassification", "text", dict(_TEXT, embedding_size=32)),
    "convbert": ("SequenceClassification", "text", dict(_TEXT, embedding_size=32)),
    "mobilebert": (
        "SequenceClassification",
        "text",
        dict(_TEXT, embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2),
    ),
    "xlnet": (
        "SequenceClassification",
        "text",
        dict(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64),
    ),
    "fnet": ("SequenceClassification", "ids", dict(_TEXT, use_tpu_fourier_optimizations=False)),
    "t5": ("Seq2SeqLM", "seq2seq", _T5),
    "mt5": ("Seq2SeqLM", "seq2seq", _T5),
    "bart": ("Seq2SeqLM", "seq2seq", _BART),
    "mbart": ("Seq2SeqLM", "seq2seq", _BART),
    "pegasus": ("Seq2SeqLM", "seq2seq", _BART),
    "marian": ("Seq2SeqLM", "seq2seq", dict(_BART, decoder_vocab_size=VOCABULARY)),
    "vit": ("ImageClassification", "images", _IMAGES),
    "deit": ("ImageClassification", "images", _IMAGES),
    "beit": (
        "ImageClassification",
        "images",
        dict(_IMAGES, use_relative_position_bias=True, layer_scale_init_value=0.1),
    ),
    "dinov2": ("ImageClassification", "images", _IMAGES),
    "swin": (
        "ImageClassification",
        "images",
        dict(
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
    ),
    "swinv2": (
        "ImageClassification",
        "images",
        dict(
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
    ),
    "convnext": ("ImageClassification", "images", dict(_STAGES, hidden_sizes=[8, 16, 24, 32])),
    "convnextv2": ("ImageClassification", "images", dict(_STAGES, hidden_sizes=[8, 16, 24, 32])),
    "resnet": (
        "ImageClassification",
        "images",
        dict(_STAGES, embedding_size=8, hidden_sizes=[8, 16, 24, 32]),
    ),
    "regnet": (
        "ImageClassification",
        "images",
        dict(_STAGES, embedding_size=8, hidden_sizes=[8, 16, 24, 32], groups_width=8),
    ),
    "segformer": (
        "SemanticSegmentation",
        "images",
        dict(_STAGES, hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=16),
    ),
    "poolformer": (
        "ImageClassification",
        "images",
        dict(_STAGES, hidden_sizes=[8, 16, 24, 32], layer_scale_init_value=0.1),
    ),
    "pvt": (
        "ImageClassification",
        "images",
        dict(_STAGES, image_size=32, hidden_sizes=[8, 16, 24, 32]),
    ),
    "mobilevit": (
        "ImageClassification",
        "images",
        dict(
            hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64], image_size=64
        ),
    ),
    "wav2vec2": ("CTC", "speech", _SPEECH),
    "hubert": ("CTC", "speech", _SPEECH),
    "wavlm": ("CTC", "speech", _SPEECH),
    "whisper": (
        "SpeechSeq2Seq",
        "spectrogram",
        dict(
            _BART,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            decoder_start_token_id=1,
        ),
    ),
    "clip": ("", "pairs", _TOWERS),
    "siglip": ("", "pairs", _TOWERS),
    "blip": ("", "pairs", _TOWERS),
}


def transformers_cases() -> Iterator[Case]:
    """One small configuration per model type."""
    declare_missing_ops()
    import transformers

    def build(kind: str, head: str, options: dict[str, Any]) -> nn.Module:
        config = transformers.AutoConfig.for_model(kind, **options)
        config._experts_implementation = "batched_mm"  # a loop over experts cannot be exported
        model: nn.Module = getattr(transformers, f"AutoModel{head and 'For' + head}").from_config(
            config
        )
        return model

    for kind, (head, inputs, options) in TRANSFORMERS.items():
        yield Case(kind, partial(build, kind, head, options), partial(_INPUTS[inputs]))


def _tokens(n: int) -> Tensor:
    """Ids that end with the last of the vocabulary, which CLIP takes for the end of the text."""
    ids = torch.randint(2, VOCABULARY - 1, (n, TOKENS))
    ids[:, -1] = VOCABULARY - 1
    return ids


def _text(n: int, **more: Any) -> dict[str, Any]:
    ids = _tokens(n)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), **more)


_INPUTS: dict[str, Callable[[int], Any]] = {
    "text": _text,
    "ids": lambda n: dict(input_ids=_tokens(n)),
    "causal": lambda n: _text(n, use_cache=False),
    "recurrent": lambda n: dict(input_ids=_tokens(n), use_cache=False),
    "seq2seq": lambda n: _text(n, decoder_input_ids=_tokens(n), use_cache=False),
    "images": lambda n: dict(pixel_values=torch.randn(n, 3, 32, 32)),
    "speech": lambda n: dict(input_values=torch.randn(n, 400)),
    "spectrogram": lambda n: dict(
        input_features=torch.randn(n, 8, 32), decoder_input_ids=_tokens(n), use_cache=False
    ),
    "pairs": lambda n: _text(n, pixel_values=torch.randn(n, 3, 32, 32)),
}


ZOOS: dict[str, Callable[[], Iterator[Case]]] = {
    "torchvision": torchvision_cases,
    "transformers": transformers_cases,
}
