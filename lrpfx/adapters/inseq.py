"""LRP among inseq's attribution methods: ``pip install 'lrpfx[inseq]'``.

After ``import lrpfx.adapters.inseq`` the method has the name "lrp":
``inseq.load_model(model, "lrp", rules="attnlrp").attribute(text)``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrpfx.adapters.kept import Kept
from lrpfx.plan import RulesLike

try:
    from inseq.attr.feat import GradientAttributionRegistry
    from inseq.attr.feat.attribution_utils import get_source_target_attributions
    from inseq.attr.feat.feature_attribution import FeatureAttribution
    from inseq.data.attribution import CoarseFeatureAttributionStepOutput
except ImportError as error:
    raise ImportError("lrpfx.adapters.inseq needs inseq: pip install 'lrpfx[inseq]'.") from error

#: What is explained: source and target prefix, of a decoder alone the latter.
_EMBEDDINGS = ("inputs_embeds", "decoder_inputs_embeds")


class LRPAttribution(GradientAttributionRegistry):  # type: ignore[misc]
    """Relevance of each token: that of its embedding, summed over features.

    The function that inseq attributes (``attributed_fn``) is explained as a callable target is: its
    gradient by the model's output, times the output.

    Args:
        attribution_model: inseq's model.
        rules: See ``lrpfx.explain``.
        **kwargs: Of inseq's methods.
    """

    method_name = "lrp"

    def __init__(self, attribution_model: Any, rules: RulesLike = None, **kwargs: Any) -> None:
        super().__init__(attribution_model, hook_to_model=False, **kwargs)
        # Prefixes grow by a token with each step.
        self._kept = Kept(attribution_model.model, rules, dynamic=(1,))
        self.hook(**kwargs)

    def hook(self, **kwargs: Any) -> None:
        """Leave the model's embeddings as they are."""
        FeatureAttribution.hook(self, **kwargs)

    def unhook(self, **kwargs: Any) -> None:
        """Nothing has been changed."""
        FeatureAttribution.unhook(self, **kwargs)

    def attribute_step(
        self, attribute_fn_main_args: dict[str, Any], attribution_args: dict[str, Any] | None = None
    ) -> CoarseFeatureAttributionStepOutput:
        """Relevance of the tokens so far for the next one; called by inseq."""
        model, inputs = self.attribution_model, attribute_fn_main_args["inputs"]
        further = attribute_fn_main_args["additional_forward_args"]
        batch, target, attributed, names, values = _read(model)(model, *inputs, *further)

        def chosen(output: Any) -> Tensor:
            given = model.formatter.format_step_function_args(
                attribution_model=model,
                forward_output=output,
                target_ids=target.squeeze(-1),
                is_attributed_fn=True,
                batch=batch,
            )
            pairs = zip(names, values, strict=True)
            found: Tensor = attributed(given, **{k: v for k, v in pairs if v is not None})
            return found

        arguments = _arguments(batch, model.is_encoder_decoder)
        explained = [name for name in _EMBEDDINGS if name in arguments]
        found = self._kept.explain(arguments, chosen, wrt=tuple(explained), ledger=False).relevance
        tokens = tuple(found[name].sum(-1) for name in explained)
        source, prefix = get_source_target_attributions(tokens, model.is_encoder_decoder)
        return CoarseFeatureAttributionStepOutput(
            source_attributions=source, target_attributions=prefix, step_scores={}
        )


def _read(model: Any) -> Any:
    """Takes apart what inseq calls its models with."""

    def read(
        model: Any,
        batch: Any,
        target: Tensor,
        attributed: Any,
        embeds: bool,
        names: Any,
        *args: Any,
    ) -> tuple[Any, ...]:
        return batch, target, attributed, names or [], args

    return model.formatter.format_forward_args(read)


def _arguments(batch: Any, both: bool) -> dict[str, Any]:
    """The keyword arguments that inseq calls the model with."""
    if not both:
        given = {"inputs_embeds": batch.input_embeds, "attention_mask": batch.attention_mask}
    else:
        given = {
            "inputs_embeds": batch.source_embeds,
            "attention_mask": batch.source_mask,
            "decoder_inputs_embeds": batch.target_embeds,
            "decoder_attention_mask": batch.target_mask,
        }
    plain = {k: v.detach() for k, v in given.items() if v is not None}
    return {**plain, "use_cache": False}
