"""LXT's relevance, in an environment of its own: ``python lxt_maps.py folder``.

It replaces methods of the classes of a model, and needs transformers 4.52. The folder holds
``task.pt``; ``maps.pt`` is written there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.faithfulness.tasks import llama
from benchmarks.faithfulness.tasks import vision_transformer as network


def main(folder: Path) -> None:
    """Explain what is in the folder."""
    given = torch.load(folder / "task.pt", weights_only=True)
    maps = _tokens(given) if given["kind"] == "tokens" else _images(given)
    torch.save(maps, folder / "maps.pt")


def _tokens(given: dict[str, Any]) -> dict[str, tuple[Tensor, float]]:
    from lxt.efficient import monkey_patch
    from transformers.models.llama import modeling_llama

    monkey_patch(modeling_llama)
    model = llama().eval().requires_grad_(False)
    model.load_state_dict(given["state"])

    def call() -> Tensor:
        vectors = model.get_input_embeddings()(given["x"]).detach().requires_grad_()
        logits = model(inputs_embeds=vectors, use_cache=False).logits[:, -1]
        logits[torch.arange(len(logits)), given["classes"]].sum().backward()
        return (vectors * vectors.grad).sum(-1).detach()

    return {"AttnLRP": _timed(call)}


def _images(given: dict[str, Any]) -> dict[str, tuple[Tensor, float]]:
    import zennit.rules
    from lxt.efficient import monkey_patch, monkey_patch_zennit
    from torch import nn
    from torchvision.models import vision_transformer
    from zennit.composites import LayerMapComposite

    monkey_patch(vision_transformer)
    monkey_patch_zennit()
    model = network().eval().requires_grad_(False)
    model.load_state_dict(given["state"])
    found = {}
    for conv, linear in ((0.25, 0.05), (0.0, 0.0)):
        rules = LayerMapComposite(
            [(nn.Conv2d, zennit.rules.Gamma(conv)), (nn.Linear, zennit.rules.Gamma(linear))]
        )

        def call(rules: Any = rules) -> Tensor:
            rules.register(model)
            x = given["x"].detach().requires_grad_()
            logits = model(x)
            logits[torch.arange(len(logits)), given["classes"]].sum().backward()
            rules.remove()
            return (x * x.grad).detach()

        found[f"CP-LRP, Gamma({conv:g}) and Gamma({linear:g})"] = _timed(call)
    return found


def _timed(call: Any) -> tuple[Tensor, float]:
    call()
    begin = time.process_time()
    relevance = call()
    return relevance, time.process_time() - begin


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
