"""A spelling of each table is exported; the whole tables are recorded, and exported in nightly."""

import pytest

from tests.canonize.folding import test_convolutions, test_folding
from tests.canonize.opened import test_products
from tests.canonize.softmaxes import test_attention_spelled, test_norms_and_softmaxes
from tests.canonize.whole import test_activations
from tests.canonize.writes import test_sums_and_writes
from tests.oracle.spellings import assert_images_agree, assert_rows_agree, assert_tokens_agree

IMAGES = {
    "residual into x": test_sums_and_writes.IMAGES["residual into x"],
    "frozen batch norm": test_folding.IMAGES["frozen batch norm"],
    "u-net": test_convolutions.IMAGES["u-net"],
    "masked_fill_": test_activations.IMAGES["masked_fill_"],
}
ROWS = {
    "two lerps of one difference": test_sums_and_writes.ROWS["two lerps of one difference"],
    "routed experts": test_products.ROWS["routed experts"],
    "softplus by hand": test_activations.ROWS["softplus by hand"],
    "softmax in range": test_norms_and_softmaxes.ROWS["softmax in range"],
}
TOKENS = {"TransformerEncoderLayer": test_attention_spelled.TOKENS["TransformerEncoderLayer"]}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    spelled, plain, *rules = IMAGES[name]
    assert_images_agree(spelled, plain, *[r[-1:] for r in rules] or [("alpha_beta_flat",)])


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    spelled, plain, *rules = ROWS[name]
    assert_rows_agree(spelled, plain, *[r[-1:] for r in rules] or [("gamma",)])


def test_tokens() -> None:
    spelled, plain, *_ = TOKENS["TransformerEncoderLayer"]
    assert_tokens_agree(spelled, plain, ("attnlrp",))
