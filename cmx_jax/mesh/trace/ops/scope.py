"""The user's `named_scope`s in the names that JAX gives operations."""

import re
from functools import cache

# parts that come from the structure of the program, not from the user
STRUCTURE = re.compile(
    r"p?jit|(?:p?jit|pmap|core_call|xla_call)\(.*\)|shard_map|while|body|cond|scan|branch_\d+_fun|closed_call"
    r"|eval_jaxpr|checkpoint|remat\d?|rematted_computation|custom_[jv][jv]p_call\w*|(?:core|xla)_call"
)
# `transpose(jvp(Dispatch))`: the user's scope in a transformation
WRAPPED = re.compile(r"(?:jvp|vjp|transpose|vmap|linearize|remat|checkpoint|rematted_computation)\((.*)\)")


def join_scopes(outer: str, inner: str) -> str:
    """Returns the scope of `inner` inside `outer`."""
    return "/".join(part for part in (outer, inner) if part)


@cache
def scopes(op_name: str) -> str:
    """Returns the `named_scope`s of `jit(f)/while/body/jvp(Moe)/Dispatch/all_to_all`: `Moe/Dispatch`."""
    kept = []
    for part in op_name.split(";")[0].split("/")[
        :-1
    ]:  # the last part is the operation; after `;` others follow
        if part.startswith("("):  # `(psum:psum:Moe`: combined operations, and their scope
            part = part[1:].rsplit(":", 1)[-1]
        while wrapped := WRAPPED.fullmatch(part):
            part = wrapped.group(1)
        if part and not STRUCTURE.fullmatch(part):
            kept.append(part)
    return "/".join(kept)
