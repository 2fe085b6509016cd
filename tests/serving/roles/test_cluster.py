"""Six processes say what the model says offline: greedy, sampled, alone, together, whole and in parts."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving.ems.stores import eventually
from serving.roles.cluster import BLOCK, Cluster, text
from serving.roles.conftest import TOKENS

from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.scheduling.request import SamplingParams

pytestmark = pytest.mark.slow


def test_cluster_greedy(cluster: Cluster, cluster_prompts, offline) -> None:
    """Greedy text equals that of the model, and workers share blocks."""
    long = cluster_prompts[1]
    with cluster.asked(cluster_prompts, max_tokens=TOKENS) as answers:
        assert [text(answer) for answer in answers] == offline

    def cached() -> int:
        answer = cluster.ask(long, max_tokens=TOKENS)
        assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == offline[1]
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    eventually(lambda: cached() == (len(long) - 1) // BLOCK * BLOCK)
    prefill, decode = ([p.status() for p in kind] for kind in (cluster.prefill, cluster.decode))
    assert sum(status["counters"]["prefix_hits"] for status in prefill) > 0
    assert all(status["kv"]["offered"] > 0 for status in prefill)
    assert all(status["counters"]["steps"] > 0 for status in decode)
    assert all(0 < status["counters"]["accepted"] < status["counters"]["drafts"] for status in decode)


def test_cluster_disconnect(cluster: Cluster, cluster_prompts, offline) -> None:
    """Streams end when their client leaves, and others continue."""

    def stream(index: int) -> tuple[str, int] | None:
        body: dict[str, Any] = {
            "prompt": cluster_prompts[index],
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": True,
        }
        body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        result, parts, tokens = "", 0, 0
        with cluster.http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if not line or line == "data: [DONE]":
                    continue
                document = json.loads(line.removeprefix("data: "))
                result += "".join(choice["text"] for choice in document["choices"])
                tokens = (document["usage"] or {}).get("completion_tokens", 0)
                parts += 1
                if index % 2 and parts == index:
                    return None
        assert parts > 10
        return result, tokens

    with ThreadPoolExecutor(len(cluster_prompts)) as pool:
        result = list(pool.map(stream, range(len(cluster_prompts))))
    assert result == [None if index % 2 else expected for index, expected in enumerate(offline)]


def test_cluster_sampling(cluster: Cluster, llm: LLM, cluster_prompts) -> None:
    """Sampled text depends on the seed only."""
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
    [completion] = llm.generate(cluster_prompts[3:4], max_new_tokens=30, ignore_eos=True, **options)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(cluster.ask, cluster_prompts[3], max_tokens=30, **options) for _ in range(3)]
    assert [text(answer) for answer in answers] == [(completion.text, 30)] * 3


def test_cluster_logprobs(cluster: Cluster, llm: LLM, cluster_prompts) -> None:
    """Log-probabilities equal those of the model."""
    prompt, params = cluster_prompts[2], SamplingParams(max_tokens=9, ignore_eos=True, logprobs=3)
    request = llm.engine.submit(prompt, params)
    llm.engine.run()
    result = cluster.ask(prompt, max_tokens=9, logprobs=3)["choices"][0]["logprobs"]
    assert result["tokens"] == [llm.model.tokenizer.decode([token]) for token in request.tokens]
    assert result["token_logprobs"] == pytest.approx([score.logprob for score in request.logprobs], abs=1e-3)
    assert [len(top) for top in result["top_logprobs"]] == [3] * 9


def test_cluster_echo(cluster: Cluster, llm: LLM, cluster_prompts) -> None:
    """`echo` scores the model's own tokens as they were scored during generation."""
    [completion] = llm.generate(cluster_prompts[:1], max_new_tokens=6, ignore_eos=True)
    choice = cluster.ask(cluster_prompts[0], max_tokens=6, logprobs=0)["choices"][0]
    ids = [*cluster_prompts[0], *completion.tokens]
    result = cluster.ask(ids, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert result["text"] == llm.model.tokenizer.decode(ids, skip_special_tokens=False)
    scores = result["logprobs"]["token_logprobs"]
    assert (len(scores), scores[0]) == (len(ids), None)
    assert scores[-6:] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-3)
