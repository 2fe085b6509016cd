"""`from_pretrained` on the model that ships: every runner and width gives the dense reference's values."""

from pathlib import Path

import numpy as np
import pytest
from reference.dense import greedy, logits

import cmx_jax
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.model import locate

pytestmark = pytest.mark.slow

TINY = locate("tiny")
PROMPTS = ("The json module", "A dictionary is", "Return a list of")
TOKENS = 12


@pytest.fixture(scope="module")
def encoded() -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(encoded: list[list[int]]) -> list[list[int]]:
    return [list(greedy(TINY, prompt, TOKENS)) for prompt in encoded]


REPLICAS = {"redundant_slots": 32, "shared_slots": 32, "eplb_interval": 4}


@pytest.mark.parametrize(
    ("runner", "ranks", "exchange", "fields"),
    [
        ("lanes", 8, "flat", {"microbatches": 2}),
        ("lanes", 320, "hierarchical", REPLICAS | {"num_speculative_tokens": 1}),
        ("lanes", 768, "flat", {}),
        ("lanes", 16, "allgather", {"num_speculative_tokens": 2}),
        ("devices", 8, "hierarchical", {"max_num_batched_tokens": 16}),
        ("devices", 16, "flat", REPLICAS | {"microbatches": 2, "num_speculative_tokens": 1}),
        ("devices", 160, "hierarchical", REPLICAS | {"num_speculative_tokens": 1}),
    ],
)
def test_runners_widths_and_layouts_equal_dense_reference(
    runner, ranks, exchange, fields, encoded, expected
) -> None:
    llm = cmx_jax.from_pretrained(
        "tiny", runner=runner, ranks=ranks, exchange=exchange, max_num_seqs=8, max_model_len=64, **fields
    )
    if ranks < 320:  # `logits` runs a row for each rank: of hundreds of lanes that would be most of the test
        tokens = np.asarray(encoded[0] + expected[0], np.int32)[None]
        np.testing.assert_allclose(llm.logits(tokens)[0], logits(TINY, tokens[0]), atol=1e-5, rtol=0)
    completions = llm.generate(PROMPTS, max_new_tokens=TOKENS, ignore_eos=True)
    assert [c.tokens for c in completions] == expected
    assert [c.prompt_tokens for c in completions] == encoded
    assert bool(llm.moves) == ("eplb_interval" in fields)


@pytest.mark.parametrize(("wire", "dtype"), [("int8", "float32"), ("bfloat16", "bfloat16")])
def test_narrow_wires_stay_close(wire, dtype, encoded) -> None:
    """Both round each message at about 1/256: the logits (of magnitude 10) move by less than half a unit."""
    llm = cmx_jax.from_pretrained("tiny", dtype=dtype, wire=wire)
    got = llm.logits(np.asarray(encoded[0], np.int32)[None])[0]
    exact = logits(TINY, np.asarray(encoded[0]))
    assert 1e-4 < np.abs(got - exact).max() < 0.5


def test_text_is_the_tokens_decoded() -> None:
    [completion] = cmx_jax.from_pretrained("tiny").generate("The json module", max_new_tokens=8)
    assert completion.text == str(completion)
    assert completion.text.isprintable() or "\n" in completion.text
    assert len(completion.tokens) <= 8


def test_shipped_mtp_layer_is_loaded() -> None:
    assert cmx_jax.from_pretrained("tiny").model.checkpoint.mtp


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_path": "no-such-model"}, "neither a directory nor a model that ships: tiny"),
        ({"runner": "threads"}, "runner 'threads' is unknown, expected one of"),
        ({"runner": "devices", "ranks": 384}, "a program over 384 CPU devices would deadlock"),
        ({"ranks": 0}, "0 ranks, expected at least 1"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8' is unknown, expected one of .'auto', "),
        ({"wire": "int4"}, "wire 'int4', expected one of"),
        ({"exchange": "post"}, "exchange 'post' is unknown, expected one of"),
        ({"ranks": 12, "exchange": "hierarchical"}, "12 ranks on 12 NPUs, expected whole nodes of 8"),
        ({"max_model_len": 513}, "max_model_len is 513, expected 1 to the model's context of 512"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"eplb_interval": -1}, "eplb_interval is -1, expected zero"),
        (
            {"eplb_interval": 1, "ranks": 3},
            "256 experts, 0 redundant and 0 shared slots are 256, expected to fill",
        ),
        ({"microbatches": 0}, "microbatches is 0, expected at least 1"),
        ({"microbatches": 10**6}, "microbatches is 1000000, expected at most 64"),
        (
            {"num_speculative_tokens": 10**5},
            "num_speculative_tokens is 100000, expected zero or more, at most",
        ),
        ({"redundant_slots": 1}, "257 expert slots do not divide over 8 ranks"),
        ({"shared_slots": -8}, "shared_slots is -8, expected 0 or more"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens is -1, expected zero or more"),
    ],
)
def test_impossible_options_are_refused_in_one_line(arguments, message) -> None:
    with pytest.raises(CmxError, match=message) as caught:
        cmx_jax.from_pretrained(**({"name_or_path": "tiny"} | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((1, 3)), "expected integers"),
        (np.zeros(3, np.int32), "expected integers"),
        (np.zeros((0, 3), np.int32), "expected integers"),
        (np.full((1, 3), 2048), r"expected \[0, 2048\)"),
        (np.full((1, 3), -1), r"expected \[0, 2048\)"),
        (np.zeros((1, 513), np.int32), "513 tokens exceed the context of 512"),
    ],
)
def test_tokens_that_are_none_are_refused(tokens, message) -> None:
    with pytest.raises(CmxError, match=message):
        cmx_jax.from_pretrained("tiny").logits(tokens)


def test_model_without_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(Path(__file__).parents[1] / "goldens" / "base" / name)
    llm = cmx_jax.from_pretrained(tmp_path, ranks=2)
    with pytest.raises(CmxError, match=r"no tokenizer\.json: give token ids"):
        llm.generate(["text"])
    with pytest.raises(CmxError, match="expected text or a list of token ids"):
        llm.generate([3])
    assert len(llm.generate([[1, 2]], max_new_tokens=2, ignore_eos=True)[0].tokens) == 2


@pytest.mark.parametrize("broken", ["start_prefill", "start_decode"])
def test_interrupted_call_leaves_nothing(monkeypatch, broken) -> None:
    llm = cmx_jax.from_pretrained("tiny", ranks=2)
    whole = llm.generate(["A class is"], max_new_tokens=3)
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(llm.instance, broken, interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["A class is"] * 3, max_new_tokens=3)
    assert llm.instance.allocator.load == 0
    assert llm.generate(["A class is"], max_new_tokens=3)[0].tokens == whole[0].tokens
