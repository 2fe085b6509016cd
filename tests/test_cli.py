"""The `cmx` command as a user runs it: in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.dense import Dense, greedy
from reference.int8 import Int8Wire

from cmx_jax.serving.deploy.demo import AGAIN, PROMPTS
from cmx_jax.serving.deploy.model import Model, locate

GOLDENS = Path(__file__).parent / "goldens"


def cmx(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cmx_jax.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def demo(*arguments: str) -> dict[str, Any]:
    done = cmx("demo", "--json", "--max-tokens", "6", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_greedy(result: dict[str, Any], reference: type[Dense]) -> None:
    """Every token of the demo's texts is the likeliest one of a dense reference after those before it."""
    model, dense = Model.read("tiny"), reference(str(locate("tiny")), np.float64)
    assert [r["prompt"] for r in result["requests"]] == [*PROMPTS, *AGAIN]
    for r in result["requests"]:
        prompt = model.encode(r["prompt"])
        assert r["prompt_tokens"] == len(prompt)
        assert min(r["ttft_s"], r["tpot_s"]) > 0
        tokens = list(prompt)
        for _ in range(r["output_tokens"]):
            tokens.append(int(dense.logits(np.array(tokens))[-1].argmax()))
        assert model.decode(tokens[len(prompt) :]) == r["text"]


@pytest.mark.slow
def test_demo_is_the_papers_deployment() -> None:
    """The demo on 384 devices gives the dense INT8 reference's tokens; its numbers are counted again here."""
    result = demo()
    assert result["devices"] == 384
    assert [entry["npus"] for entry in result["pools"]["decode"]] == [160]
    assert [entry["npus"] for entry in result["pools"]["prefill"]] == [16] * 14
    assert result["pools"]["spare"]["npus"] == 0
    check_greedy(result, Int8Wire)
    shown = {e["mechanism"]: e["figures"] for e in result["mechanisms"]}
    names = (
        "pools int8 int8-wire static-mailboxes dies microbatches mtp replicas eplb sp-tp-sp caching transfer"
    )
    assert [*shown] == [*names.split(), "peers", "planes"]
    assert shown["pools"] == {"instances": 15, "npus": 384}
    assert shown["dies"] == {"ranks": 320, "devices": 160}
    assert shown["static-mailboxes"] == {"most_rounds": 2, "streams": 2}
    assert shown["replicas"] == {"experts": 256, "redundant": 32, "shared": 32}
    requests = result["requests"]
    drafts, accepted = shown["mtp"]["proposed"], shown["mtp"]["accepted"]
    busy = sum(r["output_tokens"] - 1 for r in requests)
    assert 0 < accepted < drafts
    assert busy <= drafts + accepted <= busy + len(requests)  # the last draft may exceed the limit
    block, layers = 16, 5  # tokens; four layers and the MTP layer
    cached = [(len(Model.read("tiny").encode(r["prompt"])) - 1) // block * block for r in requests[-2:]]
    assert [r["cached_tokens"] for r in requests[-2:]] == cached
    assert shown["caching"]["hits"] == sum(cached) == 96
    computed = sum(r["prompt_tokens"] for r in requests) - sum(cached)
    assert shown["sp-tp-sp"]["tokens"] == computed
    # eight routed experts and the shared one of each token: in three MoE layers and the MTP layer
    messages = 9 * (4 * computed + 3 * 2 * drafts + drafts + accepted)
    wire = shown["int8-wire"]
    assert (wire["dispatched"], wire["combined"]) == (messages * (160 + 6), messages * 160 * 2)
    row = layers * 80 * 4  # bytes
    pages = sum(-(-r["prompt_tokens"] // block) for r in requests)
    blocks = 3  # all of the long prompts' blocks are in the part that they share
    moved = {"rdma": pages * block * row, "vpc": blocks * block * row}
    fetched = sum(cached) * row
    assert shown["planes"] == moved | {
        "ub": sum(wire[k] for k in ("dispatched", "combined")) + fetched + moved["vpc"]
    }
    assert sum(sum(ranks.values()) for ranks in shown["transfer"]["by_rank"].values()) == len(requests)
    for move in shown["eplb"]["prefill"]:
        assert 0 < move["moved"] <= move["slots"] == 320 * 4
        assert move["before"] <= move["after"] <= 1
    assert shown["eplb"]["prefill"]
    assert 0 < shown["peers"]["overlapped"] <= shown["peers"]["decode_steps"]


@pytest.mark.slow
def test_plain_demo_matches_float_reference() -> None:
    """With every mechanism switched off the demo gives the float reference's tokens."""
    result = demo("--plain", "--prefill-instances", "2")
    check_greedy(result, Dense)
    shown = {e["mechanism"]: e["figures"] for e in result["mechanisms"]}
    assert [*shown] == ["pools", "exchange", "transfer", "peers", "planes"]
    assert shown["pools"] == {"instances": 3, "npus": 160 + 2 * 16}
    assert shown["exchange"]["wire"] == "float32"


@pytest.mark.slow
def test_generate_text() -> None:
    """`cmx generate` prints the prompt and its continuation."""
    done = cmx("generate", "tiny", "--prompt", "The json module", "--max-tokens", "6")
    assert done.returncode == 0, done.stderr
    tokens = greedy(locate("tiny"), Model.read("tiny").encode("The json module"), 6)
    assert done.stdout == "The json module" + Model.read("tiny").decode(list(tokens)) + "\n"


@pytest.mark.slow
def test_generate_seeds() -> None:
    """Equal seeds repeat the text, other seeds change it."""
    draw = ("generate", "tiny", "--prompt", "It is", "--max-tokens", "8", "--temperature", "1", "--json")
    first, second, other = (json.loads(cmx(*draw, "--seed", seed).stdout) for seed in ("1", "1", "2"))
    assert first["requests"][0]["tokens"] == second["requests"][0]["tokens"]
    assert first["requests"][0]["tokens"] != other["requests"][0]["tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "nowhere", "--prompt", "x"), "model 'nowhere' is neither a directory nor"),
        (("generate", "tiny", "--prompt", "x" * 2000), "exceed the context of 512"),
        (("generate", "tiny", "--prompt", ""), "the prompt is empty"),
        (("generate", "tiny", "--prompt", "x", "--max-tokens", "0"), "max_tokens is 0, expected at least 1"),
        (("generate", "tiny", "--prompt", "x", "--ranks", "384", "--runner", "devices"), "would deadlock"),
        (("generate", "tiny", "--prompt", "x", "--ranks", "100000", "--runner", "devices"), "at most 4096"),
        (("generate", "tiny", "--prompt", "x", "--top-k", "99999999999"), "top_k is 99999999999"),
        (("generate", "~nosuchuser/x", "--prompt", "x"), "neither a directory nor"),
        (("generate", "tiny", "--prompt", "x", "--ranks", "zwei"), "invalid int value: 'zwei'"),
        (("generate", str(GOLDENS), "--prompt", "x"), "no config.json there"),
        (("generate", str(GOLDENS / "base"), "--prompt", "x"), "has no tokenizer.json"),
        (("generate", "tiny"), "arguments are required: --prompt"),
        (
            ("generate", "tiny", "--prompt", "x", "--kv-cache-dtype", "int4"),
            "kv_cache_dtype 'int4' is unknown",
        ),
        (
            ("demo", "--without", "replicas", "--eplb-interval", "4"),
            "0 redundant and 0 shared slots are 256, expected to fill the 320",
        ),
        (
            ("demo", "--shared-slots", "40"),
            "256 experts, 32 redundant and 40 shared slots do not divide over 32 prefill ranks, "
            "expected for example 24",
        ),
        (("demo", "--prefill-instances", "15"), "15 x 16 prefill NPUs need 400, CloudMatrix384 has 384"),
        (
            ("demo", "--max-tokens", "300"),
            "prompt and max_tokens are 354 tokens, expected at most 256",
        ),
        (("demo", "--max-tokens", "0"), "max_tokens is 0, expected at least 1"),
        (("demo", "--microbatches", "0"), "microbatches is 0, expected at least 1"),
        (("demo", "--without", "mtp,magic"), "mechanism 'magic' is unknown, expected one of dies, int8,"),
        (("compare", "tiny", "--layouts", "ep8,ep8"), "layout 'ep8' is given twice"),
        (("compare", "tiny", "--layouts", "ep8", "--html", "/nowhere/x.html"), "/nowhere is not a directory"),
        (("sing",), "invalid choice: 'sing'"),
    ],
)
@pytest.mark.slow
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    """A mistake ends with one line and exit code 2."""
    done = cmx(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_trace_full_size() -> None:
    """`cmx trace` prints the collectives of a full-size step."""
    result = json.loads(cmx("trace", "deepseek-r1", "--json").stdout)
    rows = [(c["op"], c["count"], c["plane"]) for c in result["collectives"]]
    assert rows == [("all_to_all", 58, "nodes")] * 2
    assert "Dispatch" in cmx("trace", "tiny", "--layout", "ep16", "--context", "256").stdout


def test_compare(tmp_path: Path) -> None:
    """`cmx compare` prints one document and writes the report."""
    page = tmp_path / "report.html"
    done = cmx("compare", "deepseek-r1", "--layouts", "ep320,ep160", "--json", "--html", str(page))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [(x["name"], x["ranks"]) for x in result["layouts"]] == [("ep320", 320), ("ep160", 160)]
    assert page.read_text().count("<svg") == 5
