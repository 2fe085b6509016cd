"""Custom calls by their targets: which of them neither compute products nor send anything."""

_PLAIN = (  # these place, select or check data, or mark parts of a collective
    "Sharding",
    "SPMD",
    "xla.sdy.",
    "AsyncCollective",
    "PrepareAsyncCall",
    "AllocateBuffer",
    "MoveTo",
    "annotate_device_placement",
    "TopK",
    "ApproxTopK",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
)


def is_plain(target: str) -> bool:
    """Returns whether a custom call is known to compute no products and to send nothing."""
    return target.startswith(_PLAIN)
