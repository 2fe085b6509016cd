"""Layouts of large-scale expert parallelism serve transformers' tokens: replicas, shared slots, microbatches,
drafts, shared sequences, chunks, and experts that move while requests run."""

from typing import Any

import jax
import numpy as np
import pytest
from support import BASE, MTP_GOLDENS, serve

import cmx_jax
from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.mesh.runners import make_runner
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.request import SamplingParams

pytestmark = pytest.mark.slow

TOKENS = 24


def start(
    case: str, ranks: int, runner: str = "lanes", first_device: int = 0, drafts: int = 0, **fields: Any
) -> Instance:
    """An instance whose pages hold NaN; fields of `Capacity` and of `Layout`."""
    model = Model.read(MTP_GOLDENS / case)
    room = {"sequences": 2, "pages": 24} | {
        name: fields.pop(name) for name in ("sequences", "pages", "max_num_batched_tokens") if name in fields
    }
    layout = expert_parallel(ranks, model.config.n_routed_experts, **fields)
    runner_ = make_runner(runner, layout.axes, first_device, layout.ranks_per_npu)
    one = model.instance("instance", layout, runner_, Capacity(page_width=8, **room), drafts)
    one.programs.cache = one.programs.cache.replace(pages=one.programs.cache.pages * np.float32("nan"))
    return one


def prompts(case: str) -> tuple[list[list[int]], list[int]]:
    """Returns the golden prompt among prefixes of it, and transformers' continuation of the golden prompt."""
    golden = np.load(MTP_GOLDENS / case / "golden.npz")
    prompt = golden["prompt"].tolist()
    return [prompt, prompt[:5], prompt, prompt[:17], prompt[:1]], golden["generated"][:TOKENS].tolist()


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, int], list[int]]:
    return {}


def check(engine: Engine, case: str, alone: dict[tuple[str, int], list[int]]) -> None:
    """The whole prompt gives transformers' tokens, a prefix those that every other layout gives it."""
    given, expected = prompts(case)
    found = serve(engine, given, TOKENS)
    assert found[0] == found[2] == expected
    for prompt, tokens in zip(given, found, strict=True):
        assert alone.setdefault((case, len(prompt)), tokens) == tokens
    assert not any(
        i.allocator.places or i.allocator.load or i.allocator.prefilling
        for i in (*engine.prefill, engine.decode)
    )


REPLICAS = {"redundant_slots": 4, "shared_slots": 4}
DIES = {"ranks_per_npu": 2}


@pytest.mark.parametrize(
    ("case", "runner", "ranks", "drafts", "fields"),
    [
        ("yarn", "lanes", 4, 0, {}),
        ("yarn", "devices", 4, 1, {"microbatches": 2, "redundant_slots": 8, "exchange": "hierarchical"}),
        ("yarn", "lanes", 8, 1, REPLICAS | {"microbatches": 2, "mailbox_rows": 0}),
        ("no_q_lora", "devices", 8, 0, REPLICAS | {"exchange": "allgather"}),
        ("no_q_lora", "lanes", 4, 2, REPLICAS | {"mailbox_rows": 1}),
        ("one_group", "lanes", 2, 3, {"microbatches": 2, "redundant_slots": 2, "exchange": "allgather"}),
        ("yarn", "devices", 8, 1, DIES | REPLICAS | {"microbatches": 2, "exchange": "hierarchical"}),
        ("yarn", "lanes", 8, 1, DIES | REPLICAS | {"mailbox_rows": 0}),
        ("no_q_lora", "devices", 8, 2, DIES | REPLICAS | {"mailbox_rows": 0}),
        ("no_q_lora", "devices", 4, 0, DIES | {"exchange": "allgather"}),
        ("yarn", "devices", 384, 1, DIES | {"exchange": "hierarchical", "sequences": 1, "pages": 8}),
    ],
)
def test_layouts_give_transformers_tokens(case, runner, ranks, drafts, fields, alone) -> None:
    one = start(case, ranks, runner, drafts=drafts, **fields)
    check(Engine([one], one), case, alone)
    assert one.traffic.proposed.size == drafts


@pytest.mark.parametrize(
    ("case", "runner", "drafts", "fields"),
    [
        ("yarn", "devices", 1, {}),
        ("yarn", "lanes", 1, {"max_num_batched_tokens": 8, "microbatches": 2}),
        ("no_q_lora", "devices", 0, {"max_num_batched_tokens": 16, "redundant_slots": 2}),
        ("yarn", "devices", 1, DIES | {"ranks": 6}),  # heads over three NPUs, tokens over their dies
        ("yarn", "devices", 1, DIES | {"ranks": 8, "redundant_slots": 8, "max_num_batched_tokens": 16}),
        ("yarn", "lanes", 0, {"ranks": 4, "exchange": "hierarchical"}),  # all heads on each
    ],
)
def test_ranks_that_share_sequences_prefill_for_others(case, runner, drafts, fields, alone) -> None:
    """SP-TP-SP over ranks that share three heads; prompts packed, and in chunks where the row is short."""
    ranks = fields.get("ranks", 3)
    fields = {name: value for name, value in fields.items() if name != "ranks"}
    prefill = start(case, ranks, runner, share_sequences=True, drafts=drafts, **fields)
    decode = start(case, 4, runner, 12, drafts=drafts, sequences=4, pages=48)
    check(Engine([prefill], decode), case, alone)
    assert len(prefill.traffic.sent) > 1  # groups of decode ranks ask one prefill rank each
    if "max_num_batched_tokens" in fields:
        assert prefill.traffic.steps >= 3


@pytest.mark.parametrize("budget", [8, 11, 24])
def test_chunks_of_any_length_on_ranks_of_their_own(budget: int, alone) -> None:
    """Also a model with grouped-query attention would do; here latents expand over cached rows."""
    one = start("yarn", 2, drafts=1, sequences=3, pages=40, max_num_batched_tokens=budget)
    check(Engine([one], one), "yarn", alone)


def test_chunks_leave_the_rows_that_a_whole_prompt_leaves() -> None:
    """Compares all layers; rows of the MTP layer need the token after each chunk."""
    prompt, rows = prompts("yarn")[0][0], []
    for budget in (2048, 8, 16):
        one = start("yarn", 1, drafts=1, max_num_batched_tokens=budget)
        engine = Engine([one], one)
        request = engine.submit(prompt, SamplingParams(max_tokens=2, ignore_eos=True))
        engine.scheduler.admit()
        while one.allocator.prefilling:
            one.prefill()
        [pages] = one.take_pages([request], [0], 1)
        rows.append((pages.swapaxes(1, 2).reshape(-1, *pages.shape[1::2])[: len(prompt)], request.drafts))
    for chunked, drafts in rows[1:]:
        np.testing.assert_allclose(chunked, rows[0][0], atol=2e-5, rtol=0)
        assert drafts == rows[0][1]


def test_instances_with_other_pages_are_refused() -> None:
    with pytest.raises(CmxError, match="give both the same page width, dtype, kv_cache_dtype and num_"):
        Engine([start("yarn", 2, drafts=1)], start("yarn", 2))


def test_eplb_between_steps_keeps_tokens_and_programs(alone) -> None:
    one = start("yarn", 4, "devices", drafts=1, redundant_slots=8)
    check(Engine([one], one), "yarn", alone)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), one.programs.weights)
    engine = Engine([one], one, eplb_interval=5)
    try:
        check(engine, "yarn", alone)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), one.programs.weights) == shapes
    assert len(engine.moves) >= 2
    assert engine.moves[0].moved > 0
    for move in engine.moves:
        assert move.before <= move.after + 1e-9 <= 1 + 1e-9
        assert move.slots == 24 * 2  # of a MoE layer and the MTP layer


def test_slots_that_stay_empty_cannot_be_rebalanced() -> None:
    one = start("yarn", 3)
    with pytest.raises(CmxError, match="16 experts, 0 redundant and 0 shared slots are 16, expected to fill"):
        one.rebalance()


def test_seeded_text_is_independent_of_drafts() -> None:
    given, _ = prompts("yarn")
    draw = {"temperature": 0.7, "top_p": 0.9, "seed": 11}
    texts = []
    for drafts in (0, 1, 3):
        one = start("yarn", 2, drafts=drafts, sequences=3, pages=36)
        texts.append(serve(Engine([one], one), given, TOKENS, **draw))
    assert texts[0] == texts[1] == texts[2]


def test_verified_tokens_have_the_model_s_distribution() -> None:
    """Many seeds of one prompt: the token after the first, for which there was a draft, has the model's
    probabilities (chi-square)."""
    llm_prompt = prompts("yarn")[0][0]
    one = start("yarn", 1, drafts=1, sequences=512, pages=2048)
    engine = Engine([one], one)
    requests = [
        engine.submit(llm_prompt, SamplingParams(max_tokens=3, temperature=1.3, seed=seed, ignore_eos=True))
        for seed in range(512)
    ]
    engine.run()
    first = [r.tokens[0] for r in requests]
    common = max(set(first), key=first.count)
    matching = [r for r in requests if r.tokens[0] == common]
    llm = cmx_jax.from_pretrained(MTP_GOLDENS / "yarn", ranks=1)
    scores = llm.logits(np.array([[*llm_prompt, common]]))[0, -1] / 1.3
    p = np.exp(scores - scores.max())
    p /= p.sum()
    seen = np.bincount([r.tokens[1] for r in matching], minlength=len(p))
    kept = p * len(matching) >= 5
    observed, expected = (np.append(a[kept], a[~kept].sum()) for a in (seen, p * len(matching)))
    chi_square, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    assert len(matching) > 60
    assert freedom >= 2
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_impossible_values_are_refused() -> None:
    with pytest.raises(CmxError, match="2 sequences a rank do not divide into 3 microbatches"):
        start("yarn", 2, microbatches=3)
    with pytest.raises(CmxError, match="num_speculative_tokens is -1, expected zero or more, at most 16"):
        start("yarn", 2, drafts=-1)
    one = start("yarn", 3, share_sequences=True)
    with pytest.raises(CmxError, match="can prefill only"):
        serve(Engine([one], one), [[1, 2, 3]], 3)


def test_model_has_no_mtp_layer() -> None:
    model = Model.read(BASE)
    layout = expert_parallel(2, model.config.n_routed_experts)
    with pytest.raises(CmxError, match="num_speculative_tokens is 1, expected 0: the model has no MTP layer"):
        model.instance("x", layout, make_runner("lanes", layout.axes), Capacity(), 1)
