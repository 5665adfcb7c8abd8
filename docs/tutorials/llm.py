# %% [markdown]
# # Language models
#
# Which tokens made a language model say what it said next? A tiny Llama learns a task whose answer
# is known, so that the maps can be checked. The page is the output of the script
# `docs/tutorials/llm.py`.
#
# ## A model and its task
#
# A prompt lists pairs of a letter and a digit and ends with one of the letters: after
# `c 7 a 3 h 1 a` comes `3`. The only tokens that matter are the two letters `a` and the `3`.

# %%
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
KEYS, VALUES, PAIRS = "abcdef", "0123456789", 3
VOCABULARY = [*KEYS, *VALUES]


def prompts(n):
    """Pairs, and the same pairs in another order: (N, 4 * PAIRS); every second key is a question."""
    keys = torch.rand(n, len(KEYS)).argsort(1)[:, :PAIRS]
    values = torch.randint(len(KEYS), len(VOCABULARY), (n, PAIRS))
    pairs = torch.stack([keys, values], 2)
    order = torch.rand(n, PAIRS).argsort(1)[:, :, None].expand(-1, -1, 2)
    return torch.cat([pairs, pairs.gather(1, order)], 1).flatten(1)


model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
)
STEPS, QUESTION = 300, 2 * PAIRS
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=STEPS)
for step in range(STEPS):
    ids = prompts(64)
    logits = model(ids).logits[:, QUESTION::2]
    optimizer.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), ids[:, QUESTION + 1 :: 2].flatten()).backward()
    optimizer.step()
    schedule.step()
model.eval()

ids = prompts(200)
answers, ids = ids[:, QUESTION + 1], ids[:, : QUESTION + 1]
found = model(ids).logits[:, -1].argmax(1)
print(f"accuracy: {(found == answers).float().mean():.3f}")

# %% [markdown]
# ## Explain the next token
#
# The output is (N, T, V): a target names a position and a token, `(-1, token)`. For a
# batch with an answer each, a function picks them. `use_cache=False` leaves out the keys
# and values that are kept for a next token: nothing is to be explained in them.

# %%
import lrpfx

inputs = {"input_ids": ids, "use_cache": False}


def next_token(output):
    return output.logits[:, -1].gather(1, answers[:, None])[:, 0]


explanation = lrpfx.explain(model, inputs, target=next_token)
lrpfx.text.token_text(
    ids[:6],
    explanation.relevance["input_ids"][:6],
    VOCABULARY,
    labels=[f"answer {VOCABULARY[a]}" for a in answers[:6]],
)

# %% [markdown]
# The digit beside the letter that is asked for should have the most relevance. Over all prompts:

# %%
relevance = explanation.relevance["input_ids"]
key = (ids[:, :QUESTION:2] == ids[:, -1:]).int().argmax(1) * 2  # where the letter stood before
print(f"most relevant is the right digit: {(relevance.argmax(1) == key + 1).float().mean():.1%}")
share = relevance.gather(1, torch.stack([key, key + 1, torch.full_like(key, QUESTION)], 1))
share = (share.sum(0) / relevance.sum()).tolist()
print("shares: letter {:.0%}, its digit {:.0%}, question {:.0%}".format(*share))

# %% [markdown]
# ## This token and not that
#
# A contrast explains why one token and not another: the difference of their logits.

# %%
prompt = torch.tensor([[VOCABULARY.index(token) for token in "c 7 a 3 e 1 a".split()]])
explainer = lrpfx.Explainer(model, {"input_ids": prompt, "use_cache": False}, "attnlrp")
three, seven = VOCABULARY.index("3"), VOCABULARY.index("7")
explainer(
    {"input_ids": prompt, "use_cache": False},
    target=lambda output: output.logits[:, -1, three] - output.logits[:, -1, seven],
).show_tokens(VOCABULARY, labels=["3, not 7"])

# %% [markdown]
# ## Inside
#
# `layers=` asks for relevance at the outputs of modules: here how much is at each
# position after each layer. The answer's relevance moves from the digit to the question.

# %%
inside = explainer(
    {"input_ids": prompt, "use_cache": False}, (-1, three), layers=["model.layers.*"]
)
print("            ", "".join(f"{VOCABULARY[i]:>7}" for i in prompt[0]))
print("embedding   ", "".join(f"{r:7.2f}" for r in inside.relevance["input_ids"][0]))
for k in range(2):
    at = inside.layers[f"model.layers.{k}"].relevance.sum(-1)[0]
    print(f"after layer {k}", "".join(f"{r:7.2f}" for r in at))

# %% [markdown]
# ## Models with real weights
#
# What is above holds for them unchanged:
#
#     model = AutoModelForCausalLM.from_pretrained(name).eval()
#     tokenizer = AutoTokenizer.from_pretrained(name)
#     inputs = dict(**tokenizer("The capital of France is", return_tensors="pt"), use_cache=False)
#     lrpfx.explain(model, inputs, target=(-1, token)).show_tokens(tokenizer)
#
# Prompts of other lengths with one Explainer: `dynamic=(1,)`. One prompt proves nothing: compare with
# leaving tokens out, over many prompts.
