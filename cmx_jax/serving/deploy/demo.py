"""The demo: CloudMatrix-Infer on the 384-device virtual supernode, with a number for each mechanism."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from cmx_jax.errors import CmxError
from cmx_jax.mesh.host import enable_compilation_cache
from cmx_jax.mesh.pools import Pools
from cmx_jax.mesh.supernode import CLOUDMATRIX384
from cmx_jax.serving.deploy.evidence import evidence
from cmx_jax.serving.deploy.model import Model
from cmx_jax.serving.deploy.recipe import Recipe
from cmx_jax.serving.deploy.site import Site
from cmx_jax.serving.engine.engine import Engine
from cmx_jax.serving.scheduling.request import Request, SamplingParams

PREFIX = (
    "The with statement is used to wrap the execution of a block with methods defined by a context manager. "
    "This allows common try and finally usage patterns to be encapsulated for convenient reuse. "
)
"""Beginning that several prompts share, so that the caching pool has blocks for them."""
PROMPTS = (
    "The with statement",
    "Open a file",
    "A class is",
    "Convert a string",
    "If the object is",
    "The import statement",
    PREFIX + "The execution",
)
AGAIN = (PREFIX + "The execution", PREFIX + "A context manager")
"""Prompts of a second wave: one of the first again, and one that shares its beginning."""


def run(
    *,
    name_or_path: str = "tiny",
    recipe: Recipe | None = None,
    waves: tuple[tuple[str, ...], ...] = (PROMPTS, AGAIN),
    max_tokens: int = 16,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Serves prompts on a supernode and reports on pools, requests and each mechanism of the recipe.

    The programs of short sequences run once before the clock starts, so that times are of serving.

    Args:
      name_or_path: The model.
      recipe: Layouts and options of the instances; None: the paper's deployment.
      waves: Texts to continue; those of a wave are served together.
      max_tokens: Number of tokens to generate for each prompt.
      progress: Gets a line about what is being done.

    Raises:
      CmxError: The model is refused, or the recipe does not fit it or the supernode.
    """
    enable_compilation_cache()
    recipe = recipe or Recipe()
    progress("reading the model")
    site = Site.read(name_or_path, recipe)
    model = site.model
    progress(f"starting {CLOUDMATRIX384.npus} devices, {recipe.prefill_instances} prefill instance(s)")
    params = SamplingParams(max_tokens=max_tokens)
    longest = max(len(model.encode(p)) for prompts in waves for p in prompts) + max_tokens
    if longest > site.context:
        raise CmxError(
            f"the longest prompt and max_tokens are {longest} tokens, expected at most {site.context}"
        )
    try:
        engine, seconds = site.start(), 0.0
        progress("compiling (kept for the next time)")
        for n, prompts in enumerate(waves):  # decode has to run only once
            few = SamplingParams(max_tokens=1 if n else 2)
            _serve(engine, model, prompts, few, lambda _: None, namespace="warm-up")
        engine.reset_counters()
        requests = []
        for prompts in waves:
            served = _serve(engine, model, prompts, params, progress)
            seconds += max(r.finished or 0 for r in served) - min(r.arrived for r in served)
            requests += [*zip(prompts, served, strict=True)]
        pools = site.carve(recipe.prefill_instances, recipe.decode_instances)
        return report(model, pools, engine, recipe, requests, seconds)
    finally:
        site.close()


def _serve(
    engine: Engine,
    model: Model,
    prompts: tuple[str, ...],
    params: SamplingParams,
    progress: Callable[[str], None],
    namespace: str = "",
) -> list[Request]:
    """Serves prompts together, and waits until the caching pool has their blocks."""
    requests = [engine.submit(model.encode(p), params, namespace=namespace) for p in prompts]
    while engine.busy:
        engine.step()
        progress(f"serving: {sum(len(r.tokens) for r in requests)} tokens")
    if engine.mover.context is not None:
        engine.mover.run_deferred()
        engine.mover.context.settle()
    return requests


def report(
    model: Model,
    pools: Pools,
    engine: Engine,
    recipe: Recipe,
    requests: list[tuple[str, Request]],
    seconds: float,
) -> dict[str, Any]:
    """The document that `cmx demo --json` prints; `seconds` is the time in which requests were served."""
    tokens = sum(len(r.tokens) for _, r in requests)
    return {
        "model": str(model.directory.name),
        "supernode": pools.supernode.name,
        "devices": pools.supernode.npus,
        "pools": pools.as_dict(),
        "started": [i.name for i in (*engine.prefill, *engine.decoders)],
        "requests": [
            {
                "prompt": prompt,
                "text": model.decode(r.tokens),
                "prompt_tokens": len(r.prompt),
                "cached_tokens": r.cached_tokens,
                "output_tokens": len(r.tokens),
                "finish_reason": r.finish_reason,
                "ttft_s": round(r.ttft_s, 4),
                "tpot_s": round(r.tpot_s, 4),
            }
            for prompt, r in requests
        ],
        "tokens_per_s": round(tokens / seconds, 2),
        "mechanisms": [asdict(e) for e in evidence(engine, recipe)],
        "exchange": {i.name: i.exchange_bytes() for i in (*engine.prefill, *engine.decoders)},
    }


def render(result: dict[str, Any]) -> str:
    """The report for a terminal."""
    pools, lines = result["pools"], [f"{result['supernode']}: {result['devices']} devices"]
    for role in ("decode", "prefill"):
        entries = pools[role]
        first, last = entries[0]["nodes"][0], entries[-1]["nodes"][1]
        npus = entries[0]["npus"]
        lines.append(f"  {role:<8} {len(entries):>2} instance(s) of {npus:>3} NPUs, nodes {first} to {last}")
    spare = pools["spare"]
    if spare["npus"]:
        room = spare["prefill_instances"]
        lines.append(f"  {'spare':<8} {spare['npus']} NPUs, room for {room} prefill instances")
    for r in result["requests"]:
        lines.append("")
        lines.append(f"> {r['prompt']}")
        lines.append(r["text"].strip("\n"))
        cached = f" ({r['cached_tokens']} cached)" if r["cached_tokens"] else ""
        lines.append(
            f"  [{r['prompt_tokens']}{cached} + {r['output_tokens']} tokens, first after {r['ttft_s']:.2f} "
            f"s, then {r['tpot_s'] * 1000:.0f} ms a token]"
        )
    lines.append(f"\n{result['tokens_per_s']:.1f} tokens/s over all requests\n")
    width = max(len(e["mechanism"]) for e in result["mechanisms"])
    lines += [f"{e['mechanism']:<{width}}  {e['text']}" for e in result["mechanisms"]]
    return "\n".join(lines)
