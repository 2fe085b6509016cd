"""Small instances for tests that serve."""

from pathlib import Path

import numpy as np

from cmx_jax.mesh.layout import expert_parallel
from cmx_jax.mesh.runners import make_runner
from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.executor.instance import Instance
from cmx_jax.serving.scheduling.allocator import Capacity
from cmx_jax.serving.scheduling.request import SamplingParams

GOLDENS = Path(__file__).parent / "goldens"
BASE = GOLDENS / "base"
MTP_GOLDENS = Path(__file__).parent / "goldens_mtp"


def instance(
    model: Model, name: str, ranks: int, *, runner: str = "lanes", first_device: int = 0, **capacity: int
) -> Instance:
    layout = expert_parallel(ranks, model.config.n_routed_experts)
    return model.instance(
        name, layout, make_runner(runner, layout.axes, first_device), Capacity(page_width=8, **capacity)
    )


def logits_of(llm: LLM, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Returns logits of texts `[B, T]` of several lengths by one program; padding changes nothing."""
    longest = max(tokens.shape[1] for tokens in rows)
    padded = [np.pad(tokens, ((0, 0), (0, longest - tokens.shape[1]))) for tokens in rows]
    parts = np.split(llm.logits(np.concatenate(padded)), np.cumsum([len(tokens) for tokens in rows])[:-1])
    return [part[:, : tokens.shape[1]] for part, tokens in zip(parts, rows, strict=True)]


def serve(engine: Engine, prompts: list[list[int]], max_tokens: int, **params: float) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
    requests = [engine.submit(prompt, sampling) for prompt in prompts]
    engine.run()
    return [request.tokens for request in requests]
