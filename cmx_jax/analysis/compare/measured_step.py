"""Runs a step on this machine: how long it takes, and whether the layout changes its tokens."""

import time
from pathlib import Path

import numpy as np

from cmx_jax.analysis.compare.comparison import Measurement
from cmx_jax.errors import CmxError
from cmx_jax.mesh.layout import Layout, expert_parallel
from cmx_jax.serving.deploy.engine_args import EngineArgs
from cmx_jax.serving.deploy.llm import LLM
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.scheduling.request import SamplingParams

TOKENS = 8  # greedy tokens of each sequence in a decode step without drafts
COMPARED = 8  # sequences whose tokens are compared with those of a single rank
# the size of a model's files, and the tokens of all sequences, above which nothing is run
MAX_BYTES, MAX_TOKENS = 2**31, 2**16

Tokens = list[list[int]]


class Measure:
    """Runs one model's steps under layout after layout.

    Args:
      directory: Directory of the model.
      step: `decode` or `prefill`.
      context: Tokens of a sequence when the last step ends.
      drafts: MTP drafts of a decode step.
      runner: `lanes` or `devices`.
    """

    def __init__(self, directory: Path, step: str, context: int, drafts: int, runner: str):
        self.model, self.step, self.drafts, self.runner = Model.read(directory), step, drafts, runner
        self.tokens = TOKENS * (1 + drafts) if step == "decode" else 1
        self.length = max(context - self.tokens, 1)
        self.expected: Tokens | None = None  # the tokens of a single rank
        self.too_large = (
            sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) > MAX_BYTES
        )

    def __call__(self, layout: Layout, sequences: int) -> Measurement:
        """Runs one layout's step.

        Args:
          layout: Layout to run.
          sequences: Number of sequences on all ranks. Prompts are random tokens, the same for every layout.

        Returns:
          The time of the step, and how many greedy tokens of the first sequences are those of a single rank.

        Raises:
          CmxError: The model or the sequences are too large for this machine, or the layout does not run.
        """
        cached = sequences * (self.length + self.tokens)
        if self.too_large or cached > MAX_TOKENS:
            raise CmxError(
                f"the model's files are larger than {MAX_BYTES:,} bytes"
                if self.too_large
                else f"{cached:,} tokens in all sequences, expected at most {MAX_TOKENS:,}: "
                "give a smaller --batch or --context"
            )
        if self.expected is None:
            one = expert_parallel(1, self.model.config.n_routed_experts)
            self.expected, _ = self._run(self._llm(one, "lanes", COMPARED), COMPARED)
        llm = self._llm(layout, self.runner, sequences)
        tokens, _ = self._run(llm, sequences)  # compiles
        _, seconds = self._run(llm, sequences)
        pairs = [
            (a, b)
            for ours, theirs in zip(tokens[:COMPARED], self.expected, strict=False)
            for a, b in zip(ours, theirs, strict=True)
        ]
        return Measurement(self.runner, seconds, len(pairs), sum(a == b for a, b in pairs))

    def prompts(self, sequences: int) -> Tokens:
        """Returns random prompts; the first ones do not depend on how many there are."""
        rng, vocabulary = np.random.default_rng(0), self.model.config.vocab_size
        return [rng.integers(0, vocabulary, self.length).tolist() for _ in range(sequences)]

    def _llm(self, layout: Layout, runner: str, sequences: int) -> LLM:
        args = EngineArgs(
            runner=runner,
            max_num_seqs=sequences,
            max_model_len=self.length + self.tokens,
            num_speculative_tokens=self.drafts,
        )
        return LLM.on_layout(self.model, layout, args)

    def _run(self, llm: LLM, sequences: int) -> tuple[Tokens, float]:
        """Returns greedy tokens of each sequence, and the step's seconds from turns that do nothing else."""
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
