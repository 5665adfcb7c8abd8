"""Train a tiny Llama to look things up, and ask which token it took the answer from.

    python examples/llm.py [picture.png]

A sentence lists pairs and then asks for one of them: "c 7 a 3 h 1 b 9 a" is answered by "3". So it
is known which token matters: the value beside the key that is asked for. Training takes seconds,
and relevance has to point at that value.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lrpfx

KEYS, VALUES = "abcdefgh", "0123456789"
VOCABULARY = [*KEYS, *VALUES]
PAIRS = 4
STEPS, BATCH = 300, 64
QUESTION = 2 * PAIRS  # where it stands in a sentence
LEAST_ACCURACY = 0.97  # of the model, and of its explanations


def sentences(n: int) -> tuple[Tensor, Tensor]:
    """Pairs, and the same pairs once more in another order, (N, 4 * PAIRS).

    With it the place (N,) of the value that answers the first of the second list's keys.
    """
    keys = torch.rand(n, len(KEYS)).argsort(1)[:, :PAIRS]  # each at most once
    values = torch.randint(len(KEYS), len(VOCABULARY), (n, PAIRS))
    order = torch.rand(n, PAIRS).argsort(1)
    first = torch.stack([keys, values], 2)
    second = first.gather(1, order[:, :, None].expand(-1, -1, 2))
    return torch.cat([first, second], 1).flatten(1), 2 * order[:, 0] + 1


def train(model: nn.Module) -> None:
    """All keys of the second list are questions, which is more to learn from than one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS)
    model.train()
    for _ in range(STEPS):
        ids, _ = sentences(BATCH)
        logits = model(ids).logits[:, QUESTION::2]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), ids[:, QUESTION + 1 :: 2].flatten()).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def main(path: Path | None = None) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
        )
    )
    train(model)
    ids, places = sentences(400)
    answers = ids[:, QUESTION + 1]
    ids = ids[:, : QUESTION + 1]
    with torch.no_grad():
        accuracy = (model(ids).logits[:, -1].argmax(1) == answers).float().mean().item()
    print(f"accuracy: {accuracy:.3f}")
    if accuracy < LEAST_ACCURACY:
        sys.exit("the model is not worth explaining")

    explanation = lrpfx.explain(
        model,
        {"input_ids": ids, "use_cache": False},
        target=lambda output: output.logits[:, -1].gather(1, answers[:, None])[:, 0],
        rules="attnlrp",
    )
    print(explanation.report.summary()[-1])
    print("what speaks for each answer (+) and against it (-), by token:")
    text = explanation.show_tokens(VOCABULARY, labels=[f"{VOCABULARY[i]} <-" for i in answers])
    print(*str(text).splitlines()[:8], sep="\n")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text.plot(path, limit=8, width=4.2)

    relevance = explanation.relevance["input_ids"]
    share = relevance / relevance.sum(1, keepdim=True)
    value, key = (share.gather(1, places[:, None] - i).mean().item() for i in (0, 1))
    print(
        f"shares of the relevance, mean of {len(ids)} sentences: the value asked for {value:.2f}, "
        f"the key beside it {key:.2f}, the question {share[:, -1].mean():.2f}, "
        f"the other {2 * PAIRS - 2} tokens together {1 - value - key - share[:, -1].mean():.2f}"
    )
    found = (relevance.argmax(1) == places).float().mean().item()
    print(f"the value asked for has the most relevance in {found:.1%} of the sentences")
    if found < LEAST_ACCURACY:
        sys.exit("relevance does not point at the value")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
