"""The adapter for lm-evaluation-harness: its three functions everywhere, the harness itself where it is."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from cmx_jax.analysis.eval import harness
from cmx_jax.analysis.eval.harness import TASKS, CmxLM
from cmx_jax.analysis.eval.score import likelihoods
from cmx_jax.errors import CmxError
from cmx_jax.serving.deploy.llm import LLM

CONTEXT = 32
PROMPT = "Return a list of"


@pytest.fixture
def lm(tiny: LLM) -> CmxLM:
    """The shipped model with a short context."""
    lm = CmxLM(tiny)
    lm.context = CONTEXT
    return lm


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.mark.slow
def test_loglikelihood_is_of_the_continuation_encoded_with_its_context(lm) -> None:
    encode, long = lm.model.encode, "the list of the strings " * 20
    scores = lm.loglikelihood(
        requests((PROMPT, " the"), (PROMPT + " ", "the"), ("", PROMPT), (long + PROMPT, " the"))
    )
    tokens, length = encode(PROMPT + " the"), len(encode(PROMPT))
    context, continuation = tokens[:length], tokens[length:]
    cut = encode(long + PROMPT)[-CONTEXT:]  # the continuation's one token is not run
    pairs = [(context, continuation)] * 2 + [([0], encode(PROMPT)), (cut, continuation)]
    expected = [(score.logprob, score.greedy) for score in likelihoods(lm.llm, pairs)]
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([p for p, _ in scores], [p for p, _ in expected], atol=1e-4)


def test_continuation_longer_than_context_is_refused(lm) -> None:
    with pytest.raises(CmxError, match="tokens exceeds the context of 32"):
        lm.loglikelihood(requests((PROMPT, " zebra" * 40)))


def test_rolling_windows_predict_each_token_once_with_full_contexts(lm, monkeypatch) -> None:
    """The example in the harness's documentation: ten tokens, four at a time."""
    monkeypatch.setattr(lm, "context", 4)
    tokens = lm.model.encode(PROMPT * 3)[:10]
    monkeypatch.setattr(type(lm.model), "encode", lambda *_, **__: tokens)
    assert [(prefix, target) for prefix, target in lm._rolling("")][1:] == [
        (tokens[3:4], tokens[4:8]),
        (tokens[5:8], tokens[8:10]),
    ]


def test_loglikelihood_rolling_sums_over_windows(lm) -> None:
    text = "The json module returns a list of strings. " * 4
    tokens = lm.model.encode(text)
    assert CONTEXT < len(tokens) < 2 * CONTEXT
    head, short = tokens[:CONTEXT], lm.model.encode(PROMPT)
    pairs = [([0], head), (tokens[-CONTEXT - 1 : CONTEXT], tokens[CONTEXT:]), ([0], short)]
    first, second, third = (score.logprob for score in likelihoods(lm.llm, pairs))
    logprobs = lm.loglikelihood_rolling(requests((text,), (PROMPT,)))
    np.testing.assert_allclose(logprobs, [first + second, third], atol=1e-4)


@pytest.mark.slow
def test_generate_until_cuts_greedy_text_before_the_first_stop(lm) -> None:
    [completion] = lm.llm.generate([PROMPT], max_new_tokens=8)
    third = completion.text.split(" ")[3]
    long = "a class " * 40
    [cut] = lm.llm.generate([lm.model.encode(long)[-(CONTEXT - 8) :]], max_new_tokens=8)
    texts = lm.generate_until(
        requests(
            (PROMPT, {"until": ["\0", third], "max_gen_toks": 8}),
            (long, {"until": "\0", "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}),
            (PROMPT, {"max_gen_toks": 3, "until": []}),
        )
    )
    assert texts[:2] == [completion.text.split(third)[0], cut.text]
    assert completion.text.startswith(texts[2])


@pytest.mark.slow
def test_sampling_again_gives_another_sample(lm) -> None:
    sampled = (PROMPT, {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0})
    first, second = lm.generate_until(requests(sampled, sampled))
    assert first != second
    assert [first, second] == lm.generate_until(requests(sampled, sampled))


def test_capacity_without_room_for_a_prompt_is_refused(lm) -> None:
    with pytest.raises(CmxError, match="max_gen_toks is 256, expected less than the context of 32"):
        lm.generate_until(requests((PROMPT, {})))


def test_model_is_made_from_harness_arguments() -> None:
    lm = CmxLM(pretrained="tiny", ranks=2, batch_size=1, max_batch_size=None, device="cpu")
    assert (lm.llm.instance.layout.ranks, lm.context) == (2, 512)


def test_without_the_harness_one_line_says_how_to_get_it(monkeypatch, capsys) -> None:
    from cmx_jax import cli

    monkeypatch.setattr(harness, "INSTALLED", False)
    assert cli.main(["eval", "tiny", "--suite", "lm-eval:mmlu"]) == 2
    assert capsys.readouterr().err == (
        "cmx: error: lm-evaluation-harness is not installed: pip install 'cmx_jax[lm-eval]'\n"
    )


SIXTEEN = [
    *("MMLU", "MMLU-Pro", "DROP", "IFEval", "GPQA Diamond", "SimpleQA", "LiveCodeBench", "HumanEval"),
    *("AIME 2024", "MATH-500", "CNMO 2024", "MGSM", "CLUEWSC", "C-Eval", "C-SimpleQA", "C-MMLU"),
]


def test_paper_benchmarks_are_run_or_reported_missing() -> None:
    text = (TASKS / "cloudmatrix.yaml").read_text()
    named = [line.split("# ")[1] for line in text.splitlines() if line.startswith("  - ")]
    [missing] = [line for line in text.splitlines() if line.startswith("# Not in the harness")]
    assert sorted(named + missing.split(": ")[1].rstrip(".").split(", ")) == sorted(SIXTEEN)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")
def test_harness_runs_offline_tasks_and_knows_paper_tasks() -> None:
    """Runs in a process of its own, since imports of the harness warn."""
    code = (
        "import json, sys\n"
        "from cmx_jax.analysis.eval.harness import TASKS\n"
        "from lm_eval.api.registry import get_model, model_registry\n"
        "from lm_eval.evaluator import simple_evaluate\n"
        "from lm_eval.tasks import TaskManager\n"
        "import lm_eval.models\n"
        "manager = TaskManager(include_path=str(TASKS))\n"
        "names = [line.split()[1] for line in (TASKS / 'cloudmatrix.yaml').read_text().splitlines()\n"
        "         if line.startswith('  - ')]\n"
        "if 'cmx' not in model_registry:\n"
        "    model_registry.register('cmx', target='cmx_jax.analysis.eval.harness:CmxLM')\n"
        "found = simple_evaluate('cmx', {'pretrained': 'tiny', 'ranks': 2}, ['cmx_copy', 'cmx_continue'],\n"
        "                        task_manager=manager, limit=8, bootstrap_iters=0)\n"
        "print(json.dumps([[n for n in names if n not in manager.all_tasks],\n"
        "                  'cloudmatrix' in manager.all_groups,\n"
        "                  found['results']['cmx_copy']['acc,none'],\n"
        "                  found['results']['cmx_continue']['exact_match,first_word']]))\n"
    )
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, env=offline
    )
    assert done.returncode == 0, done.stderr
    unknown, group, copied, continued = json.loads(done.stdout.splitlines()[-1])
    assert (unknown, group) == ([], True)
    assert copied > 0.5
    assert 0 <= continued <= 1
