"""The `cmx` command as a user runs it: in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from reference.dense import greedy

from cmx_jax.serving.deploy.demo import PROMPTS
from cmx_jax.serving.deploy.model import Model, locate

GOLDENS = Path(__file__).parent / "goldens"


def cmx(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cmx_jax.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_demo_matches_dense_reference() -> None:
    """The demo on 384 devices generates the dense reference's tokens."""
    done = cmx("demo", "--json", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["devices"] == 384
    assert [entry["npus"] for entry in result["pools"]["decode"]] == [160]
    assert [entry["npus"] for entry in result["pools"]["prefill"]] == [16] * 6
    assert result["pools"]["spare"] == {"npus": 128, "prefill_instances": 8}
    assert [r["prompt"] for r in result["requests"]] == list(PROMPTS)
    model = Model.read("tiny")
    for r in result["requests"]:
        prompt = model.encode(r["prompt"])
        tokens = list(greedy(locate("tiny"), prompt, r["output_tokens"]))
        assert r["text"] == model.decode(tokens)
        assert r["prompt_tokens"] == len(prompt)
        assert r["ttft_s"] > 0
        assert r["tpot_s"] > 0
    decode, layers, top_k = result["exchange"]["decode-0"], 3, 8
    busy = sum(r["output_tokens"] - 1 for r in result["requests"])
    drafts = decode["drafts_proposed"][0]  # one with each token that went in
    accepted = round(decode["acceptance"][0] * drafts)
    assert busy <= drafts + accepted <= busy + len(PROMPTS)  # the last draft may exceed the limit
    assert accepted > 0
    messages = top_k * (layers * 2 * drafts + drafts + accepted) / decode["steps"] / 160
    assert decode["combine_bytes"] == pytest.approx(messages * 160 * 4)
    assert decode["dispatch_bytes"] == pytest.approx(messages * (160 + 2) * 4)


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
            ("demo", "--eplb-interval", "4"),
            "0 redundant and 0 shared slots are 256, expected to fill the 320",
        ),
        (("demo", "--shared-slots", "32"), "288 expert slots do not divide over 160 ranks"),
        (("demo", "--prefill-instances", "7"), "7 prefill instances asked for, expected 1 to 6"),
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
