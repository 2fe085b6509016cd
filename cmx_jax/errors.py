"""The one exception that says: the input is wrong, not the program."""


class CmxError(ValueError):
    """A user's mistake in one line: what was given, what was expected, what to do.

    The `cmx` command prints the message and exits 2; Python callers may catch it as a `ValueError`.

    Example:
      >>> import cmx_jax
      >>> try:
      ...     cmx_jax.from_pretrained("no/such/model")
      ... except cmx_jax.CmxError as error:
      ...     print(str(error)[:5])
      model
    """
