"""Whether a step fits a rank's memory, and how many sequences would."""

from cmx_jax.analysis.cost.constants import Machine
from cmx_jax.analysis.predict.operators import Step
from cmx_jax.analysis.trace.memory import by_layout
from cmx_jax.errors import CmxError


def check_fits(of: Step, on: Machine, batch: int) -> dict[str, float]:
    """GB of a rank's memory, by what they hold. `batch`: sequences of an NPU.

    Raises:
      CmxError: they are more than there is; says how many sequences would fit.
    """
    found = by_layout(of.c, of.layout, of.sequences, of.context, of.kind == "prefill", of.drafts)
    buffers = {"dispatch buffer", "combine buffer"}
    needed = {
        "weights": sum(size for name, size in found.items() if name != "cache" and name not in buffers) / 1e9,
        "cache": found["cache"] / 1e9,
        "mailboxes": sum(found.get(name, 0) for name in buffers) / 1e9,
    }
    if of.layout.sequence:  # every rank keeps the rows of the prompts whose pages it owns
        needed["cache"] /= of.layout.sequence_ranks
    there = on["hbm_gb"]
    if sum(needed.values()) > there:
        each = (needed["cache"] + needed["mailboxes"]) / batch
        whole = of.layout.microbatches * (1 if of.layout.sequence else on.ranks_per_npu)
        most = int((there - needed["weights"]) / each) if needed["weights"] < there else 0
        most -= most % whole
        what = ", ".join(f"{name} {gb:.1f}" for name, gb in needed.items())
        fits = f"at most {most} fit" if most else "not even one does: take more ranks"
        raise CmxError(
            f"batch {batch} of {of.context} tokens needs {sum(needed.values()):.1f} GB of a rank's "
            f"{there:g} ({what}): {fits}"
        )
    return needed
