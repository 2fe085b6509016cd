"""Families beside DeepSeek in disaggregated serving: real devices, moved pages, NaN where nobody looks."""

import numpy as np
import pytest
from support import GOLDENS, instance, serve

import cmx_jax
from cmx_jax.errors import CmxError
from cmx_jax.mesh.exchange import EXCHANGES
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.engine.engine import Engine

pytestmark = pytest.mark.slow

CASES = ("qwen3_sliding", "llama4_base")


@pytest.mark.parametrize("case", CASES)
def test_moved_pages_give_transformers_tokens(case: str) -> None:
    golden = np.load(GOLDENS / case / "golden.npz")
    model = Model.read(GOLDENS / case)
    prefill = instance(model, "prefill", 2, sequences=1, pages=12, runner="devices")
    decode = instance(model, "decode", 4, sequences=2, pages=24, runner="devices", first_device=2)
    for i in (prefill, decode):
        i.programs.cache = i.programs.cache.replace(pages=i.programs.cache.pages * np.float32("nan"))
    prompt, expected = golden["prompt"].tolist(), golden["generated"].tolist()
    other = golden["tokens_40"][0].tolist()
    given = serve(Engine([prefill], decode), [prompt, other, prompt], len(expected))
    assert given[0] == given[2] == expected


@pytest.mark.parametrize("exchange", sorted(EXCHANGES.keys() - {"flat", "ragged"}))
def test_weighted_inputs_travel_by_every_exchange(exchange: str) -> None:
    golden = np.load(GOLDENS / "llama4_top2" / "golden.npz")
    llm = cmx_jax.from_pretrained(GOLDENS / "llama4_top2", ranks=8, exchange=exchange, max_num_seqs=2)
    np.testing.assert_allclose(llm.logits(golden["tokens_40"]), golden["logits_40"], atol=1e-4, rtol=0)


def test_ragged_exchange_is_refused_on_cpu() -> None:
    with pytest.raises(CmxError, match=r"exchange 'ragged' does not run between lanes: .*Choose flat"):
        cmx_jax.from_pretrained(GOLDENS / "llama4_top2", ranks=8, exchange="ragged")
