"""INT8 pages in serving: however a prompt is cut, drafted, spread and moved, the tokens stay those of a dense
model that rounds each token's latent and key once."""

from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pytest
from reference.dense import Dense
from support import GOLDENS, MTP_GOLDENS, serve

import cmx_jax
from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.mesh.runners import make_runner
from cmx_jax.quant.rows import Int8Rows
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.request import SamplingParams

pytestmark = pytest.mark.slow

TOKENS = 12
YARN = MTP_GOLDENS / "yarn"
LENGTHS = (40, 5, 17, 1)


def start(
    case: Any,
    ranks: int,
    kind: str = "lanes",
    first: int = 0,
    drafts: int = 0,
    kv: str = "int8",
    **given: Any,
) -> Instance:
    """An instance whose pages hold junk, scales of NaN among it; fields of `Capacity` and of `Layout`."""
    room = {"sequences": 2, "pages": 24} | {
        name: given.pop(name) for name in ("sequences", "pages", "max_num_batched_tokens") if name in given
    }
    model = Model.read(case)
    layout = expert_parallel(ranks, model.config.n_routed_experts, **given)
    runner, capacity = make_runner(kind, layout.axes, first), Capacity(page_width=8, **room)
    one = model.instance("instance", layout, runner, capacity, drafts, kv)
    if kv == "int8":
        held = one.programs.cache.pages
        junk = Int8Rows(held.q + np.int8(77), held.scale * np.float32("nan"))
        one.programs.cache = one.programs.cache.replace(pages=junk)
    return one


class Rounded(Dense):
    """The dense model with an INT8 cache."""

    def kept(self, latent: np.ndarray, rotated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return rounded(latent), rounded(rotated)


def rounded(x: np.ndarray) -> np.ndarray:
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(x / step) * step


@lru_cache
def prompts() -> list[list[int]]:
    prompt = np.load(YARN / "golden.npz")["prompt"].tolist()
    return [(prompt * 4)[:length] for length in LENGTHS]


@lru_cache
def expected() -> list[list[int]]:
    model, found = Rounded(str(YARN), np.float64), []
    for prompt in prompts():
        tokens = list(prompt)
        for _ in range(TOKENS):
            tokens.append(int(model.logits(np.array(tokens))[-1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


@pytest.mark.parametrize(
    ("kind", "ranks", "drafts", "fields"),
    [
        ("lanes", 4, 0, {}),
        ("devices", 4, 1, {"microbatches": 2, "max_num_batched_tokens": 16}),
    ],
)
def test_tokens_are_independent_of_chunks_drafts_streams_runners(kind, ranks, drafts, fields) -> None:
    one = start(YARN, ranks, kind, drafts=drafts, **fields)
    assert serve(Engine([one], one), prompts(), TOKENS) == expected()


def test_shared_sequences_exchange_rounded_rows() -> None:
    fields = {"max_num_batched_tokens": 8, "microbatches": 2}
    prefill = start(YARN, 3, "devices", share_sequences=True, drafts=1, **fields)
    decode = start(YARN, 4, "devices", 3, drafts=1)
    assert serve(Engine([prefill], decode), prompts(), TOKENS) == expected()


def test_grouped_queries_see_the_same_rows_in_chunks_and_elsewhere() -> None:
    case = "qwen3_sliding"
    golden = np.load(GOLDENS / case / "golden.npz")
    given = [golden["prompt"].tolist(), golden["tokens_40"][0].tolist()]
    one = start(GOLDENS / case, 2)
    prefill = start(GOLDENS / case, 2, max_num_batched_tokens=8)
    decode = start(GOLDENS / case, 2)
    found = [serve(engine, given, TOKENS) for engine in (Engine([one], one), Engine([prefill], decode))]
    assert found[0] == found[1]


def test_chunks_leave_the_rows_that_a_whole_prompt_leaves() -> None:
    """Compares all layers, the MTP layer's too, except for a number that float32 rounds to the next step."""
    prompt, kept = prompts()[0], []
    for budget in (2048, 8):
        one = start(YARN, 1, drafts=1, max_num_batched_tokens=budget)
        engine = Engine([one], one)
        request = engine.submit(prompt, SamplingParams(max_tokens=2, ignore_eos=True))
        engine.scheduler.admit()
        while one.allocator.prefilling:
            one.prefill()
        [pages] = one.take_pages([request], [0], 1)
        kept.append(
            jax.tree.map(lambda a: a.swapaxes(1, 2).reshape(-1, *a.shape[1::2])[: len(prompt)], pages)
        )
    unchunked, chunked = kept
    step = np.abs(unchunked.q.astype(np.int32) - chunked.q.astype(np.int32))
    assert step.max() <= 1
    assert step.mean() < 1e-3
    np.testing.assert_allclose(chunked.scale, unchunked.scale, rtol=1e-4, atol=0)


def test_pages_that_move_keep_every_bit() -> None:
    source, target = start(YARN, 2, "devices"), start(YARN, 4, "devices", 2)
    engine = Engine([source], target)
    requests = [engine.submit(prompt, SamplingParams(max_tokens=8, ignore_eos=True)) for prompt in prompts()]
    engine.scheduler.admit()
    while source.allocator.prefilling:
        source.prefill()
    for request in requests:
        assert target.allocator.place(request, len(request.prompt), decode=True)
    ranks = [target.allocator.places[request].rank for request in requests]
    sent = source.take_pages(requests, ranks, 4)
    target.put_pages(requests, sent)
    arrived = target.take_pages(requests, ranks, 4)
    for one, other, request in zip(sent, arrived, requests, strict=True):
        assert (one.q.dtype, one.scale.dtype) == (np.int8, np.float32)
        rows = one.scale.swapaxes(1, 2).reshape(-1, *one.scale.shape[1::2])
        assert np.isfinite(rows[: len(request.prompt)]).all()
        np.testing.assert_array_equal(one.q, other.q)
        np.testing.assert_array_equal(one.scale.view(np.uint32), other.scale.view(np.uint32))


def test_instances_that_keep_other_types_are_refused() -> None:
    with pytest.raises(CmxError, match=r"'int8'\), expected .*'float32'\): give both .* kv_cache_dtype and"):
        Engine([start(YARN, 2)], start(YARN, 2, kv="auto"))


def test_tokens_are_the_likeliest_by_the_logits_of_the_same_cache() -> None:
    llm = cmx_jax.from_pretrained("tiny", ranks=2, kv_cache_dtype="int8", max_num_batched_tokens=16)
    assert llm.instance.programs.cache.dtype == "int8"
    [done] = llm.generate(["The with statement is used to wrap the execution of a block"], max_new_tokens=8)
    tokens = done.prompt_tokens + done.tokens
    assert len(done.prompt_tokens) > 8
    likeliest = llm.logits(np.array([tokens]))[0].argmax(-1)
    assert likeliest[len(done.prompt_tokens) - 1 : -1].tolist() == done.tokens


def test_rounded_rows_move_the_logits_a_little() -> None:
    text = "The json module implements a subset of the library"
    exact, narrow = (cmx_jax.from_pretrained("tiny", ranks=2, kv_cache_dtype=kv) for kv in ("auto", "int8"))
    tokens = np.array([exact.model.encode(text)])
    error = exact.logits(tokens) - narrow.logits(tokens)
    assert 1e-3 < np.sqrt(np.mean(error**2)) < 0.5
