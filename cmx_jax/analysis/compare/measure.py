"""A step that really runs, on this machine: how long it takes, and whether the layout changes its tokens."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.serving.deploy.engine_args import EngineArgs
from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.scheduling.request import SamplingParams

TOKENS = 8  # greedy tokens of each sequence, of a decode step with no drafts
HELD = 8  # sequences whose tokens are held against the single rank's
MOST_BYTES, MOST_TOKENS = 2**31, 2**16  # of a model's files; of all sequences: beyond, nothing is run

Tokens = list[list[int]]


class Measure:
    """Runs one model's steps under layout after layout.

    Args:
      directory: of the model.
      step: `decode` or `prefill`.
      context: tokens of a sequence when the last step ends.
      drafts: MTP drafts of a decode step.
      runner: `lanes` or `devices`.
    """

    def __init__(self, directory: Path, step: str, context: int, drafts: int, runner: str):
        self.model, self.step, self.drafts, self.runner = Model.read(directory), step, drafts, runner
        self.tokens = TOKENS * (1 + drafts) if step == "decode" else 1
        self.length = max(context - self.tokens, 1)
        self.alone: Tokens | None = None  # what a single rank says
        self.too_large = (
            sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) > MOST_BYTES
        )

    def __call__(self, layout: Layout, sequences: int) -> dict[str, Any]:
        """One layout.

        Args:
          layout: whose step.
          sequences: of all ranks; their prompts are random tokens, the same for every layout.

        Returns:
          `runner`, `step_s` (the median decode step, or what prefills all prompts; everything compiled), and
          of `tokens` greedy tokens of the first sequences how many are `tokens_equal` to those of a single
          rank in float32.

        Raises:
          CmxError: it is too much for here, or the layout does not run.
        """
        cached = sequences * (self.length + self.tokens)
        if self.too_large or cached > MOST_TOKENS:
            raise CmxError(
                f"a model of over {MOST_BYTES:,} bytes"
                if self.too_large
                else f"{cached:,} tokens of all sequences, at most {MOST_TOKENS:,} are: "
                "give a smaller --batch or --context"
            )
        if self.alone is None:
            one = expert_parallel(1, self.model.config.n_routed_experts)
            self.alone, _ = self._run(self._llm(one, "lanes", HELD), HELD)
        llm = self._llm(layout, self.runner, sequences)
        said, _ = self._run(llm, sequences)  # compiles
        _, seconds = self._run(llm, sequences)
        pairs = [
            (a, b)
            for ours, theirs in zip(said[:HELD], self.alone, strict=False)
            for a, b in zip(ours, theirs, strict=True)
        ]
        equal = sum(a == b for a, b in pairs)
        return {"runner": self.runner, "step_s": seconds, "tokens": len(pairs), "tokens_equal": equal}

    def prompts(self, sequences: int) -> Tokens:
        """Random tokens; the first ones are the same however many there are."""
        rng, vocabulary = np.random.default_rng(0), self.model.config.vocab_size
        return [rng.integers(0, vocabulary, self.length).tolist() for _ in range(sequences)]

    def _llm(self, layout: Layout, runner: str, sequences: int) -> LLM:
        args = EngineArgs(
            runner=runner,
            max_num_seqs=sequences,
            max_model_len=self.length + self.tokens,
            num_speculative_tokens=self.drafts,
        )
        return LLM(self.model, layout, args)

    def _run(self, llm: LLM, sequences: int) -> tuple[Tokens, float]:
        """Greedy tokens of each sequence, and seconds of a step: of turns in which nothing else is done."""
        params = SamplingParams(max_tokens=self.tokens, ignore_eos=True)
        requests = [llm.engine.submit(prompt, params) for prompt in self.prompts(sequences)]
        turns: dict[str, list[float]] = {"prefill": [], "decode": []}
        while llm.engine.busy:
            kind = "prefill" if llm.engine.waiting or llm.instance.allocator.prefilling else "decode"
            began = time.perf_counter()
            llm.engine.step()
            turns[kind].append(time.perf_counter() - began)
        seconds = sum(turns["prefill"]) if self.step == "prefill" else float(np.median(turns["decode"]))
        return [request.tokens for request in requests], seconds
