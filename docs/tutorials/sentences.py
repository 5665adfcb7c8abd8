# %% [markdown]
# # Transformers
#
# A small ModernBERT of the library `transformers` learns whether a review is glad of a film. Which words
# speak for its answer, and does it understand "not"? The page is the output of the script
# `docs/tutorials/sentences.py`; with
# a model of your own, from `from_pretrained` and with its tokenizer, begin at "Explain".
#
# ## A model and its sentences
#
# Sentences are made from a few words, so that the right answer is known: "good" and its kind are
# glad, "bad" and its kind are not, and "not" turns the word after it around.

# %%
import torch
import torch.nn.functional as F
from transformers import ModernBertConfig, ModernBertForSequenceClassification

torch.manual_seed(0)
GLAD, SAD = ["good", "great", "lovely"], ["bad", "dull", "awful"]
OTHERS = ["the", "film", "plot", "cast", "was", "and", "music"]
VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "not", *GLAD, *SAD, *OTHERS]
IDS = {word: i for i, word in enumerate(VOCABULARY)}


def encode(sentences):
    """Token ids and mask, padded to the longest, as a tokenizer gives them."""
    tokens = [["[CLS]", *sentence.split(), "[SEP]"] for sentence in sentences]
    longest = max(map(len, tokens))
    rows = [[IDS[t] for t in row] + [0] * (longest - len(row)) for row in tokens]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def review():
    """A sentence, and whether it is glad."""
    glad = bool(torch.rand(()) < 0.5)
    turned = bool(torch.rand(()) < 0.5)
    words = GLAD if glad != turned else SAD
    subject = OTHERS[int(torch.randint(1, 4, ()))]
    word = words[int(torch.randint(3, ()))]
    end = " and the music" if torch.rand(()) < 0.5 else ""
    return f"the {subject}{end} was {'not ' if turned else ''}{word}", int(glad)


model = ModernBertForSequenceClassification(
    ModernBertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        classifier_pooling="mean",
        num_labels=2,
        pad_token_id=0,
        cls_token_id=1,
        bos_token_id=1,
        sep_token_id=2,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
)
sentences, labels = zip(*[review() for _ in range(600)])
inputs, answers = encode(sentences), torch.tensor(labels)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(200):
    batch = torch.randint(len(answers), (64,))
    logits = model(**{name: t[batch] for name, t in inputs.items()}).logits
    optimizer.zero_grad()
    F.cross_entropy(logits, answers[batch]).backward()
    optimizer.step()
model.eval()
accuracy = (model(**inputs).logits.argmax(1) == answers).float().mean()
print(f"accuracy: {accuracy:.3f}")

# %% [markdown]
# ## Explain
#
# Inputs are given as the model takes them, as a dict or what the tokenizer returned. Token ids are
# explained at the embedding they look up, summed over its features; the mask is passed through.
# What decides is the difference of the two logits, so this is the target, as a function of the
# output; `target=1` would be the logit of "glad".

# %%
import lrpfx

shown = ["the film was good", "the film was not good", "the plot and the music was not dull"]
inputs = encode(shown)


def glad_or_not(output):
    return output.logits[:, 1] - output.logits[:, 0]


explanation = lrpfx.explain(model, inputs, target=glad_or_not)
special = ["[CLS]", "[SEP]", "[PAD]"]
explanation.show_tokens(VOCABULARY, skip_special=special, scale="shared")

# %% [markdown]
# Red words spoke for "glad", blue ones against it. In "not good" the word "good" has
# turned blue: on its way through attention it met "not". Special tokens are left out
# of the picture, as attention often parks on them; in numbers they are there, too:

# %%
for row, found in zip(inputs["input_ids"], explanation.relevance["input_ids"]):
    print(*(f"{VOCABULARY[i]} {r:+.1f}" for i, r in zip(row, found) if i != 0), sep="  ")

# %% [markdown]
# ## Rules for attention
#
# With attention in the model, `rules=None` is AttnLRP (Achtibat et al. 2024): relevance goes to
# queries, keys and values, and the softmax keeps a part of it. `cplrp` takes attention weights as
# constants, so that only values carry relevance, and nothing is lost in the softmax.

# %%
explainer = lrpfx.Explainer(model, inputs, "cplrp")
conserving = explainer(inputs, target=glad_or_not)
for found in (explanation, conserving):
    print(found.report.rules)
    print("  absorbed of each sentence:", [round(v, 2) for v in found.absorbed.tolist()])

# %% [markdown]
# `report.leaks()` names the places:

# %%
explanation.report.leaks(3)

# %% [markdown]
# ## Other lengths
#
# An `Explainer` takes batches of any size. Sentences of any length, too, if the dimension is named:

# %%
explainer = lrpfx.Explainer(model, inputs, dynamic=(1,))
explainer(encode(["the cast was lovely"]), target=glad_or_not).show_tokens(VOCABULARY)

# %% [markdown]
# Before working on a large model: `print(lrpfx.coverage(model, inputs))` lists ops without a rule.
# [Coverage](../coverage.md) has the model types of `transformers` that were measured.
# Vision transformers take images, and `plot()` draws them: `examples/vit.py` trains one.
# Next: [language models](llm.py), [rules](../howto.md), [capture](../capture.md).
