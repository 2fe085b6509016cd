"""Mapping of each decode rank to the prefill rank that sends it a prompt's pages (section 4.3.3).

Ranks that share sequences in prefill all hold the same rows, so any of them may send. The mapping is fixed
and even: decode ranks form as many groups as there are prefill ranks to ask, and each group asks one of
them.
"""

from cmx_jax.errors import CmxError


def prefill_tp_rank(
    decode_dp_rank: int,
    decode_tp_rank: int,
    *,
    prefill_tp_size: int,
    decode_tp_size: int,
    decode_dp_size: int,
) -> int:
    """Returns the prefill rank that sends to a decode rank, with the paper's formula and names:

        ratio = prefill_tp_size / decode_tp_size
        group_size = decode_dp_size / ratio
        group_id = floor(decode_dp_rank_id / group_size)
        prefill_tp_rank_id = group_id * decode_tp_size + decode_tp_rank_id

    Where the decode ranks do not divide into `ratio` groups, the last groups are smaller or empty.

    Raises:
      CmxError: A rank is outside its size, or `decode_tp_size` does not divide `prefill_tp_size`.
    """
    for name, rank, size in (
        ("decode_dp_rank", decode_dp_rank, decode_dp_size),
        ("decode_tp_rank", decode_tp_rank, decode_tp_size),
    ):
        if not 0 <= rank < size:
            raise CmxError(f"{name} is {rank}, expected 0 to {size - 1}")
    if prefill_tp_size < 1 or prefill_tp_size % decode_tp_size:
        raise CmxError(f"prefill_tp_size is {prefill_tp_size}, expected a multiple of {decode_tp_size}")
    ratio = prefill_tp_size // decode_tp_size
    group_size = -(-decode_dp_size // ratio)
    return decode_dp_rank // group_size * decode_tp_size + decode_tp_rank
