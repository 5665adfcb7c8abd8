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
        score: Picks of the model's output what is explained, shape (N, ...); all by default.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    score: Callable[[Any], Any] = lambda output: output


def images(*shape: int) -> Callable[[int], Tensor]:
    """Normal noise of shape (n, *shape)."""
    return lambda n: torch.randn(n, *shape)


# -- torchvision ----------------------------------------------------------------------------------

#: Side of the images, by the first name that the model's begins with; 64 elsewhere.
SIDES = {"vit": 224, "swin": 64, "maxvit": 224, "inception": 96, "alexnet": 96}

#: Videos: (channels, frames, height, width) where it is fixed, 8 frames of 64 x 64 elsewhere.
VIDEOS = dict.fromkeys(["mvit_v1_b", "mvit_v2_s", "s3d"], (3, 16, 224, 224))

DETECTORS = ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"]
DETECTORS += ["fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn"]
DETECTORS += ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn"]
DETECTORS += ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"]
DETECTORS += ["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"]


def declare_missing_ops() -> None:
    """Let PyPI's wheel of torchvision be imported beside a CPU build of torch.

    There it cannot load its own ops, and then fails to give two of them a meta function. No
    classifier calls them: declaring them is enough.
    """
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
        yield Case(name, partial(build, name), images(*VIDEOS.get(name, (3, 8, 64, 64))))
    for name in models.list_models(module=models.optical_flow):
        yield Case(name, partial(build, name), two_frames)
    for name in DETECTORS:
        side = 300 if name.startswith("ssd") else 64
        yield Case(f"{name}, backbone", partial(_backbone, build, name), images(3, side, side))


def two_frames(n: int) -> tuple[Any, ...]:
    """Two images and the number of refinements, as optical flow takes them."""
    return torch.randn(n, 3, 128, 128), torch.randn(n, 3, 128, 128), 2


def _backbone(build: Callable[..., nn.Module], name: str) -> nn.Module:
    backbone = build(name, weights_backbone=None).backbone
    assert isinstance(backbone, nn.Module)
    return backbone


# -- timm -----------------------------------------------------------------------------------------

#: Family, the variant of it with the fewest parameters, side of its images: the smallest of 64, 96,
#: 128 ... that it runs on. A star: the model is built for that side, by its option img_size.
#: Families are timm's modules (``timm.list_modules()``), and within them what is told apart by
#: name and architecture.
TIMM = """
beit                      beit_base_patch16_224             64*
beitv2                    beitv2_base_patch16_224           64*
botnet                    botnet26t_256                     64*
byoanet                   halonet_h1                        256
byobnet                   mobileone_s1                      64
caformer                  caformer_s18                      64
cait                      cait_xxs24_224                    64*
coat                      coat_tiny                         64*
coat_lite                 coat_lite_tiny                    64*
coatnet                   coatnet_pico_rw_224               64*
coatnext                  coatnext_nano_rw_224              64*
convformer                convformer_s18                    64
convit                    convit_tiny                       64*
convmixer                 convmixer_768_32                  64
convnext                  convnext_zepto_rms                64
convnextv2                convnextv2_atto                   64
cpubone                   cpubone_nano                      64
crossvit                  crossvit_tiny_240                 64
csatv2                    csatv2                            64
cspdarknet                cspdarknet53                      64
cspnet                    cs3darknet_focus_s                64
cspnext                   cspnext_tiny                      64
cspresnet                 cspresnet50                       64
darknet                   darknet17                         64
davit                     davit_tiny                        64
deepseek_vit              deepseek_vit_412m                 224
deit                      deit_tiny_patch16_224             64*
deit3                     deit3_small_patch16_224           64*
deit_distilled            deit_tiny_distilled_patch16_224   64*
densenet                  densenet121                       64
dinov2                    vit_small_patch14_dinov2          64*
dla                       dla46x_c                          64
dm_nfnet                  dm_nfnet_f0                       64
dpn                       dpn48b                            64
eca_nfnet                 eca_nfnet_l0                      64
ecaresnet                 ecaresnet26t                      64
edgenext                  edgenext_xx_small                 64
efficientformer           efficientformer_l1                224
efficientformer_v2        efficientformerv2_s0              64*
efficientnet              mobilenetv2_035                   64
efficientnet_lite         efficientnet_lite0                64
efficientnetv2            efficientnetv2_rw_t               128
efficientvim              efficientvim_m1                   64
efficientvit_l            efficientvit_l1                   64
efficientvit_mit          efficientvit_b0                   64
efficientvit_msra         efficientvit_m0                   64
eva                       vit_tiny_patch16_dinov3_qkvb      64
eva02                     eva02_tiny_patch14_224            64*
fasternet                 fasternet_t0                      64
fastvit                   fastvit_t8                        64
fbnetc                    fbnetc_100                        64
fbnetv3                   fbnetv3_b                         64
flexivit                  flexivit_small                    64*
focalnet                  focalnet_tiny_srf                 64
gcresnet                  gcresnet33ts                      64
gcvit                     gcvit_xxtiny                      64*
gemma4_vit                gemma4_vit_167m                   64
gernet                    gernet_s                          64
ghostnet                  ghostnet_050                      64
ghostnetv2                ghostnetv2_100                    64
ghostnetv3                ghostnetv3_050                    64
gmixer                    gmixer_12_224                     64*
hardcorenas               hardcorenas_b                     64
hgnet                     hgnetv2_b0                        64
hgnetv1                   hgnet_tiny                        64
hiera                     hiera_tiny_224                    64*
hieradet_sam2             sam2_hiera_tiny                   64
hrnet                     hrnet_w18_small                   64
iformer                   iformer_t                         64
inception_next            inception_next_atto               64
inception_resnet_v2       inception_resnet_v2               96
inception_v3              inception_v3                      96
inception_v4              inception_v4                      96
lambda_resnet             lambda_resnet26t                  64
lcnet                     lcnet_035                         64
lcnetv2                   lcnetv2_small                     64
legacy_senet              legacy_senet154                   64
levit                     levit_128s                        64*
levit_conv                levit_conv_128s                   64*
lowformer                 lowformer_b0                      64
mambaout                  mambaout_femto                    64
maxxvit                   maxxvit_rmlp_nano_rw_256          64*
metaformer                poolformerv2_s12                  64
mixer                     mixer_s16_224                     64*
mixnet                    mixnet_s                          64
mlp_mixer                 gmlp_ti16_224                     64*
mnasnet                   mnasnet_small                     64
mobilenet_edgetpu         mobilenet_edgetpu_100             64
mobilenetv1               mobilenetv1_100                   64
mobilenetv3               mobilenetv3_small_050             64
mobilenetv4               mobilenetv4_conv_small_035        64
mobilenetv4_hybrid        mobilenetv4_hybrid_medium_075     64
mobilenetv5               mobilenetv5_base                  64
mobilevit                 mobilevit_xxs                     64
mobilevitv2               mobilevitv2_050                   64
mvitv2                    mvitv2_tiny                       64
naflexvit                 naflexvit_base_patch16_parfac_gap 64
nasnet                    nasnetalarge                      64
nest                      nest_tiny                         64*
nextvit                   nextvit_small                     64
nf_resnet                 nf_resnet26                       64
nfnet                     nf_regnet_b0                      64
pit                       pit_ti_224                        64*
pnasnet                   pnasnet5large                     64
poolformer                poolformer_s12                    64
pvt_v2                    pvt_v2_b0                         64
qwen3_vit                 qwen3_vit_88m                     64
rdnet                     rdnet_tiny                        64
regnet                    regnetx_002                       64
regnetv                   regnetv_040                       64
regnety                   regnety_002                       64
regnetz                   regnetz_005                       64
repghost                  repghostnet_050                   64
repvgg                    repvgg_a0                         64
repvit                    repvit_m0_9                       64
res2net                   res2net50_14w_8s                  64
resmlp                    resmlp_12_224                     64*
resnest                   resnest14d                        64
resnet                    resnet10t                         64
resnetaa                  resnetaa34d                       64
resnetblur                resnetblur18                      64
resnetq                   resnet51q                         64
resnetrs                  resnetrs50                        64
resnetv2                  resnetv2_18                       64
resnetv2_bit              resnetv2_50x1_bit                 64
resnext                   resnext26ts                       64
rexnet                    rexnet_100                        64
selecsls                  selecsls42                        64
semnasnet                 semnasnet_050                     64
senet                     legacy_seresnet18                 64
sequencer                 sequencer2d_s                     64
seresnet                  seresnet18                        64
seresnext                 seresnext26ts                     64
shvit                     shvit_s1                          64
sknet                     skresnet18                        64
spnasnet                  spnasnet_100                      64
starnet                   starnet_s050                      64
swiftformer               swiftformer_xs                    64
swin_s3                   swin_s3_tiny_224                  64*
swin_transformer          swin_tiny_patch4_window7_224      64*
swin_transformer_v2       swinv2_tiny_window8_256           64*
swin_transformer_v2_cr    swinv2_cr_tiny_224                64*
tiny_vit                  tiny_vit_5m_224                   64
tinynet                   tinynet_e                         64
tnt                       tnt_s_legacy_patch16_224          64*
tresnet                   tresnet_m                         64
twins                     twins_svt_small                   64
twins_pcpvt               twins_pcpvt_small                 64
vgg                       vgg11                             64
visformer                 visformer_tiny                    64*
vision_transformer        vit_tiny_patch16_224              64*
vision_transformer_hybrid vit_tiny_r_s16_p8_224             64*
vision_transformer_relpos vit_srelpos_small_patch16_224     64*
vision_transformer_sam    samvit_base_patch16_224           64
vit_rope                  vit_small_patch16_rope_224        64*
vitamin                   vitamin_small_224                 64*
volo                      volo_d1_224                       64*
vovnet                    ese_vovnet19b_slim_dw             64
wide_resnet               wide_resnet50_2                   64
xception                  legacy_xception                   64
xception_aligned          xception41p                       64
xcit                      xcit_nano_12_p8_224               64
"""


def timm_cases() -> Iterator[Case]:
    """One variant of each family."""
    declare_missing_ops()
    import timm

    known = {variant for _, variant, _ in map(str.split, TIMM.strip().splitlines())}
    for module in timm.list_modules():
        variants = timm.list_models(module=module)
        if variants and known.isdisjoint(variants):
            raise LookupError(f"the table has no variant of {module}; there are {variants}")
    for line in TIMM.strip().splitlines():
        family, variant, side = line.split()
        size = int(side.removesuffix("*"))
        options = dict(img_size=size) if side.endswith("*") else {}
        name = variant if family in variant else f"{variant} ({family})"
        make = partial(timm.create_model, variant, pretrained=False, **options)
        yield Case(name, make, images(3, size, size))


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
        dict(_STAGES, image_size=32, hidden_sizes=[8, 16, 20, 32]),
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
        config.architectures = config.architectures or []  # None is more than from_config takes
        config._experts_implementation = "batched_mm"  # a loop over experts cannot be exported
        model: nn.Module = getattr(transformers, f"AutoModel{head and 'For' + head}").from_config(
            config
        )
        return model

    for kind, (head, inputs, options) in TRANSFORMERS.items():
        score = _scores_of_pairs if inputs == "pairs" else Case.score
        yield Case(kind, partial(build, kind, head, options), _INPUTS[inputs], score)


def _scores_of_pairs(output: Any) -> Tensor:
    """Each image with its own text; the scores with the others depend on the rest of the batch."""
    scores: Tensor = output.logits_per_image
    return scores.diagonal()[:, None]


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
    "timm": timm_cases,
    "transformers": transformers_cases,
}
