"""The models that the benchmarks explain, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage import randomize
from benchmarks.measure import Work
from benchmarks.zoos import declare_missing_ops

try:
    import torchvision
except RuntimeError:
    declare_missing_ops()
    import torchvision

CLASS = 3


def score_of_class(output: Tensor) -> Tensor:
    """The class that is explained."""
    return output[:, CLASS]


def score_of_token(output: Any) -> Tensor:
    """The next token that is explained."""
    logits: Tensor = output.logits
    return logits[:, -1, CLASS]


def image_work(
    name: str, batch: int = 1, side: int = 224, device: str = "cpu", dtype: Any = torch.float32
) -> Work:
    """One of torchvision's classification models, on noise."""
    torch.manual_seed(0)
    with torch.device(device):
        x = torch.randn(batch, 3, side, side).clamp(-3, 3)
        noise = torch.randn(4, 3, side, side)
        model = randomize(torchvision.models.get_model(name, weights=None), noise).to(dtype)
        x = x.to(dtype)
    return Work(f"{name}, batch {batch}", model, x, score_of_class)


def llama(
    tokens: int,
    layers: int = 4,
    hidden: int = 256,
    heads: int = 4,
    vocabulary: int = 1000,
    device: str = "cpu",
    dtype: Any = torch.float32,
) -> Work:
    """A Llama as transformers builds it, from the embeddings to the logits of the next token."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        intermediate_size=hidden * 11 // 4,
        max_position_embeddings=max(tokens, 16),
    )
    with torch.device(device):
        # Not .to(dtype), which would round the rotary frequencies as well.
        model: nn.Module = tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        x = torch.randn(1, tokens, hidden, dtype=dtype)
    inputs = dict(inputs_embeds=x, use_cache=False, logits_to_keep=1)
    name = f"Llama, {layers} layers of {hidden}, T={tokens}"
    return Work(name, model, inputs, score_of_token, "inputs_embeds")
