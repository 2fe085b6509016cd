"""Pages from the caching pool, pages lost in transfer, and pages for other engines.

The tokens are those of the dense reference, and only the tokens of a prompt without cached blocks run.
"""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from reference.dense import greedy
from support import BASE, MTP_GOLDENS, instance

from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.ems import MPServer, Pool
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.kv import fetch
from cmx_jax.serving.kv.prefix_cache import ContextCache
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.request import Request, SamplingParams

pytestmark = pytest.mark.slow

TOKENS = 9
BLOCK = 16


def params(**options: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": TOKENS, "ignore_eos": True} | options))


@pytest.fixture(scope="module")
def long() -> list[list[int]]:
    """Prompts of 40 to 61 tokens, the first 32 of which all share but the last one."""
    rng = np.random.default_rng(11)
    shared = rng.integers(0, 64, 32).tolist()
    prompts = [shared + rng.integers(0, 64, n).tolist() for n in (8, 16, 29, 1)]
    return [*prompts, rng.integers(0, 64, 50).tolist()]


@pytest.fixture(scope="module")
def expected(long: list[list[int]]) -> list[list[int]]:
    return [list(greedy(BASE, prompt, TOKENS)) for prompt in long]


@pytest.fixture(scope="module")
def instances(base: Model) -> dict[str, list[Instance]]:
    combined = instance(base, "both", 2, sequences=3, pages=40)
    split = [
        instance(base, "prefill", 2, sequences=1, pages=32),
        instance(base, "decode", 2, sequences=3, pages=40),
    ]
    return {"one": [combined, combined], "two": split}


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    store = MPServer(tmp_path / "disk", dram=1 << 22, disk=1 << 26)
    pool = Pool({"here": store})
    yield pool
    pool.close()


def caching(pool: Pool, one: Instance) -> ContextCache:
    fingerprint = one.programs.fingerprint("base")
    return ContextCache(pool, replace(fingerprint, block=BLOCK), one.programs.cache.pages)


def served(engine: Engine, prompts: list[list[int]], **options: object) -> list[Request]:
    """Serves prompts one after the other, each when the blocks of the last one are stored."""
    requests = []
    for prompt in prompts:
        requests.append(engine.submit(prompt, params(**options)))
        engine.run()
        engine.step()  # what waits for a step is done
        if engine.mover.context is not None:
            engine.mover.context.settle()
            assert engine.mover.context.pool.flush()
    return requests


@pytest.mark.parametrize("kind", ["one", "two"])
def test_shared_beginnings_are_run_once(kind, instances, pool, long, expected) -> None:
    *prefill, decode = instances[kind]
    ran = prefill[0].computed_tokens
    context = caching(pool, decode)
    requests = served(Engine(prefill, decode, context=context), [*long, long[0]])
    assert [r.tokens for r in requests] == [*expected, expected[0]]
    # whole blocks, less the one that has the last token
    assert [r.cached_tokens for r in requests] == [0, 32, 32, 32, 0, 32]
    fresh = sum(len(r.prompt) - r.cached_tokens for r in requests)
    assert prefill[0].computed_tokens - ran == fresh
    assert context.hits == sum(r.cached_tokens for r in requests)
    context.close()


def test_blocks_are_those_of_a_namespace(instances, pool, long, expected) -> None:
    *prefill, decode = instances["one"]
    engine = Engine(prefill, decode, context=caching(pool, decode))
    served(engine, long[:1])
    other = engine.submit(long[0], params(), namespace="other")
    engine.run()
    assert (other.cached_tokens, other.tokens) == (0, expected[0])


def test_blocks_serve_another_engine_and_survive_a_restart(instances, tmp_path, long, expected) -> None:
    """Blocks from one deployment are cache hits in another, also after a restart of the pool."""
    for kind, reused in (("one", 0), ("two", 32)):
        *prefill, decode = instances[kind]
        pool = Pool({"here": MPServer(tmp_path / "disk", dram=1 << 22, disk=1 << 26)})
        [request] = served(Engine(prefill, decode, context=caching(pool, decode)), long[:1])
        assert (request.cached_tokens, request.tokens) == (reused, expected[0])
        pool.close()


@pytest.mark.parametrize("kind", ["one", "two"])
def test_conversation_reuses_generated_text(kind, instances, pool, long) -> None:
    *prefill, decode = instances[kind]
    context = caching(pool, decode)
    context.generated = True
    engine = Engine(prefill, decode, context=context)
    [first] = served(engine, long[4:], max_tokens=16)
    assert first.tokens == list(greedy(BASE, long[4], 16))
    turn = [*long[4], *first.tokens, 7, 7, 7]
    [second] = served(engine, [turn])
    assert second.cached_tokens == (50 + 15) // BLOCK * BLOCK
    assert second.tokens == list(greedy(BASE, turn, TOKENS))
    assert not any(i.allocator.load for i in engine.instances)


def test_damaged_block_is_run_again(instances, tmp_path, long, expected) -> None:
    *prefill, decode = instances["one"]
    for damaged in (False, True):
        pool = Pool({"here": MPServer(tmp_path / "disk", dram=1 << 22, disk=1 << 26)})
        for path in (p for p in (tmp_path / "disk").rglob("*") if p.is_file() and damaged):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        [request] = served(Engine(prefill, decode, context=caching(pool, decode)), long[:1])
        assert (request.cached_tokens, request.tokens) == (0, expected[0])
        pool.close()


def test_reused_blocks_with_drafts_give_the_same_text(tmp_path) -> None:
    """Their MTP rows too, whatever token followed when they were stored."""
    model = Model.read(MTP_GOLDENS / "base")
    layout_of = instance(model, "plain", 2, sequences=2, pages=40)
    combined = model.instance(
        "drafts",
        layout_of.layout,
        layout_of.programs.runner,
        Capacity(sequences=2, pages=40, page_width=8),
        1,
    )
    rng = np.random.default_rng(3)
    shared = rng.integers(0, model.config.vocab_size, 32).tolist()
    prompts = [shared + rng.integers(0, model.config.vocab_size, n).tolist() for n in (3, 7, 5)]
    plain = [r.tokens for r in served(Engine([layout_of], layout_of), prompts)]
    pool = Pool({"here": MPServer(tmp_path / "disk", dram=1 << 22, disk=1 << 26)})
    requests = served(Engine([combined], combined, context=caching(pool, combined)), prompts)
    assert [r.tokens for r in requests] == plain
    assert [r.cached_tokens for r in requests] == [0, 32, 32]
    pool.close()


def test_blocks_are_whole_pages(instances, pool) -> None:
    one = instances["one"][0]
    fingerprint = one.programs.fingerprint("base")
    with pytest.raises(CmxError, match="a block of the caching pool has 12 tokens, expected a multiple of 8"):
        ContextCache(pool, replace(fingerprint, block=12), one.programs.cache.pages)


@pytest.mark.parametrize("recompute", [True, False])
def test_damaged_pages_are_computed_again_or_fail(recompute, instances, long, expected, monkeypatch) -> None:
    prefill, decode = instances["two"]
    engine = Engine([prefill], decode, recompute=recompute)
    pull, pulled = engine.outbox.transport.pull, []

    def damaging(*arguments):
        arrays = [np.array(array) for array in pull(*arguments)]
        pulled.append(len(pulled))
        if len(pulled) in (1, 3):
            arrays[0].reshape(-1).view(np.uint8)[7] ^= 4
        return arrays

    monkeypatch.setattr(engine.outbox.transport, "pull", damaging)
    requests = [engine.submit(prompt, params()) for prompt in long]
    engine.run()
    assert engine.mover.lost == 2
    ended = [r for r in requests if r.finish_reason == "error"]
    assert len(ended) == (0 if recompute else 2)
    assert all("came damaged" in r.error for r in ended)
    for r, tokens in zip(requests, expected, strict=True):
        if r not in ended:
            assert (r.tokens, r.error) == (tokens, None)
    assert not engine.busy
    assert not engine.outbox.waiting
    assert not any(i.allocator.load for i in engine.instances)


def test_engines_serve_concurrently(instances, long, expected) -> None:
    """One only prefills, one only decodes: tickets, first tokens and drafts pass between them."""
    prefill, decode = instances["two"]
    sender, receiver = Engine([prefill], []), Engine([], decode)
    requests = [sender.submit(prompt, params()) for prompt in long]
    sender.run()
    assert {r.finish_reason for r in requests} == {"transfer"}
    assert sender.outbox.waiting == len(long)
    continued = []
    for r in requests:
        ticket = sender.mover.tickets.pop(r)
        received = fetch(
            ticket,
            sender.outbox.transport,
            decode.programs.fingerprint(),
            jax.tree.structure(decode.programs.cache.pages),
        )
        sender.outbox.acknowledge(ticket.transfer_id)
        continued.append(
            receiver.receive(list(r.prompt), r.params, first=r.tokens[0], drafts=r.drafts, pages=received)
        )
        receiver.step()
    receiver.run()
    assert [r.tokens for r in continued] == expected
    assert not sender.outbox.waiting
    assert not sender.busy
    with pytest.raises(CmxError, match="no prefill instance here"):
        receiver.submit(long[0], params())
    with pytest.raises(CmxError, match="no decode instance here"):
        sender.receive(long[0], params(), first=0, drafts=[], pages=None)
    with pytest.raises(CmxError, match="an engine without instances"):
        Engine([], [])


def test_preempted_request_ends_where_no_instance_prefills(base, instances, long) -> None:
    prefill, _ = instances["two"]
    sender = Engine([prefill], [])
    receiver = Engine([], instance(base, "small", 1, sequences=2, pages=15))
    requests = [sender.submit(prompt, params(max_tokens=20)) for prompt in (long[1], long[4])]
    sender.run()
    received = [sender.outbox.transport._held[sender.mover.tickets[r].transfer_id] for r in requests]
    continued = [
        receiver.receive(list(r.prompt), r.params, first=r.tokens[0], drafts=[], pages=pages[0])
        for r, pages in zip(requests, received, strict=True)
    ]
    receiver.run()
    complete = [list(greedy(BASE, prompt, 20)) for prompt in (long[1], long[4])]
    assert continued[0].tokens == complete[0]
    assert continued[1].finish_reason == "preempted"
    assert 0 < len(continued[1].tokens) < 20
    assert continued[1].tokens == complete[1][: len(continued[1].tokens)]
    assert not receiver.busy
