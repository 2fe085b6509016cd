"""The serving loop: any split, order and company gives the tokens of a request served alone."""

import chex
import numpy as np
import pytest
from reference.dense import greedy
from support import BASE, instance, serve

from cmx_jax.errors import CmxError
from cmx_jax.model import steps
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.scheduling.request import SamplingParams, State

TOKENS = 11


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    return [list(greedy(BASE, prompt, TOKENS)) for prompt in prompts]


@pytest.fixture(scope="module")
def split(base: Model) -> Engine:
    """Two prefill instances of 2 ranks and a decode instance of 4, with room for few at a time."""
    prefill = [instance(base, f"prefill-{i}", 2, sequences=1, pages=8) for i in range(2)]
    return Engine(prefill, instance(base, "decode", 4, sequences=1, pages=8))


def held(engine: Engine) -> int:
    return sum(len(i.allocator.places) + i.allocator.load for i in (*engine.prefill, engine.decode))


@pytest.mark.slow
def test_disaggregated_serving_equals_the_dense_reference(split, prompts, expected) -> None:
    assert serve(split, prompts, TOKENS) == expected
    assert held(split) == 0


@pytest.mark.slow
def test_combined_instance_gives_the_same(base, prompts, expected) -> None:
    combined = instance(base, "both", 4, sequences=2, pages=16)
    engine = Engine([combined], combined)
    assert serve(engine, prompts, TOKENS) == expected
    assert held(engine) == 0


def test_step_is_traced_once_for_equal_instances(base, prompts, monkeypatch) -> None:
    """A decode step is traced for the first of two equal instances, and never again for short texts."""
    short = [prompt for prompt in prompts if len(prompt) < 6]
    steps._compile_steps.cache_clear()
    monkeypatch.setattr(steps, "decode_step", chex.assert_max_traces(steps.decode_step, n=1))
    for name in ("first", "second"):
        one = instance(base, name, 2, sequences=2, pages=16)
        assert all(len(tokens) == 8 for tokens in serve(Engine([one], one), short, 8))
    steps._compile_steps.cache_clear()  # so that no other test gets the counted step


def test_requests_join_and_leave_between_steps(split, prompts, expected) -> None:
    """Each is submitted while others run, with lengths that make them end at different steps."""
    requests = []
    for i, prompt in enumerate(prompts):
        requests.append(split.submit(prompt, SamplingParams(max_tokens=3 + i % 5, ignore_eos=True)))
        split.step()
        split.step()
    split.run()
    for request, tokens in zip(requests, expected, strict=True):
        assert request.tokens == tokens[: request.params.max_tokens]
        assert request.state is State.FINISHED
    assert held(split) == 0


@pytest.mark.slow
def test_seeded_text_is_independent_of_batch(base, split, prompts) -> None:
    draw = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
    together = serve(split, prompts, TOKENS, **draw)
    combined = instance(base, "both", 2, sequences=1, pages=8)
    alone = [serve(Engine([combined], combined), [prompt], TOKENS, **draw)[0] for prompt in prompts[:3]]
    assert alone == together[:3]
    assert together != serve(split, prompts, TOKENS, **(draw | {"seed": 6}))


def test_nan_in_freed_pages_reaches_no_request(base, prompts, expected) -> None:
    prefill = instance(base, "prefill", 2, sequences=1, pages=8)
    decode = instance(base, "decode", 4, sequences=2, pages=16)
    for i in (prefill, decode):
        i.programs.cache = i.programs.cache.replace(pages=i.programs.cache.pages * np.float32("nan"))
    assert serve(Engine([prefill], decode), prompts, TOKENS) == expected


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "the prompt is empty"),
        ([64], 4, "token id 64, expected ids in"),
        ([-1], 4, "token id -1"),
        ([1] * 124, 5, "124 tokens and max_tokens 5 exceed the context of 128"),
        ([1] * 20, 109, "exceed the context of 128"),
    ],
)
def test_invalid_request_is_refused_before_it_queues(split, prompt, max_tokens, message) -> None:
    with pytest.raises(CmxError, match=message):
        split.submit(prompt, SamplingParams(max_tokens=max_tokens))
    assert not split.busy


@pytest.mark.parametrize(("prefill_pages", "decode_pages"), [(8, 2), (2, 8)])
def test_request_larger_than_a_cache_is_refused(base, prefill_pages, decode_pages) -> None:
    engine = Engine(
        [instance(base, "prefill", 2, sequences=1, pages=prefill_pages)],
        instance(base, "decode", 2, sequences=1, pages=decode_pages),
    )
    with pytest.raises(CmxError, match="cache of 2 pages of 8 tokens"):
        engine.submit([1] * 20, SamplingParams(max_tokens=4))
