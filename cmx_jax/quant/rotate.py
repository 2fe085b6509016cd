"""Orthogonal matrices that spread large values of a few inputs over all inputs (section 4.5).

`(x r) (r^T w) = x w`, and no input of `x r` is an outlier any more (QuaRot, arXiv 2404.00456). A rotation
keeps a row's length, so it commutes with an RMS norm whose weight is folded into the matrices after it
(`fold_norm`).
"""

import numpy as np
from jaxtyping import Float, Float64, Int8


def rotation(n: int, seed: int = 0) -> Float64[np.ndarray, "size size"]:
    """Returns an orthogonal matrix: a Hadamard matrix with random signs over `sqrt(n)`.

    Where no Hadamard matrix is known, it is a random rotation.

    Raises:
      ValueError: `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"a rotation of {n} inputs, expected at least one")
    rng = np.random.default_rng(seed)
    base = _base(n)
    if base is None:
        q, r = np.linalg.qr(rng.normal(size=(n, n)))
        return q * np.sign(np.diag(r))  # evenly distributed, whatever signs the factorisation chooses
    return rng.choice([-1.0, 1.0], n)[:, None] * hadamard(n) / np.sqrt(n)


def hadamard(n: int) -> Int8[np.ndarray, "size size"]:
    """Returns a Hadamard matrix: entries 1 and -1, `h h^T = n I`.

    It is one of Paley's matrices, doubled by Sylvester's construction: 1536 = 12 * 2^7, 7168 = 28 * 2^8.

    Raises:
      ValueError: No such matrix is known here.
    """
    base = _base(n)
    if base is None:
        raise ValueError(f"no Hadamard matrix of {n} rows: {n} is not 2^k times 1 or one of Paley's sizes")
    h = _paley(base)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def fold_norm(weight: Float[np.ndarray, " I"], w: Float[np.ndarray, "I O"]) -> Float64[np.ndarray, "I O"]:
    """Folds a norm's weight into the matrix after the norm: `(x * weight) w = x (weight * w)`."""
    return weight.astype(np.float64)[:, None] * w


def rotate_inputs(w: Float[np.ndarray, "I O"], r: Float64[np.ndarray, "I I"]) -> Float64[np.ndarray, "I O"]:
    """Rotates the inputs of a matrix: `(x r) (r^T w) = x w`."""
    return r.T @ w.astype(np.float64)


def rotate_outputs(w: Float[np.ndarray, "I O"], r: Float64[np.ndarray, "O O"]) -> Float64[np.ndarray, "I O"]:
    """Rotates the outputs of a matrix: `w r`."""
    return w.astype(np.float64) @ r


def _base(n: int) -> int | None:
    """Smallest `n / 2^k` that is 1 or a size of Paley's constructions; None if there is none."""
    twos = n & -n if n > 0 else 0  # the largest power of two that divides n
    sizes = (n // twos << k for k in range(twos.bit_length()))
    return next((m for m in sizes if m == 1 or _prime_of(m)), None)


def _prime_of(n: int) -> int | None:
    """Prime `p` of Paley's construction of `n` rows; None if there is none.

    Either `p % 4 = 3` and `n = p + 1`, or `p % 4 = 1` and `n = 2 p + 2`.
    """
    for p, rest in ((n - 1, 3), (n // 2 - 1, 1)):
        if n % 4 == 0 and p % 4 == rest and p > 1 and all(p % d for d in range(2, int(p**0.5) + 1)):
            return p
    return None


def _paley(n: int) -> np.ndarray:
    """Returns the Hadamard matrix of Paley's construction (1933), or that of one row.

    It is made from squares modulo a prime `p`: entry `[i, j]` of a matrix [p, p] says whether `i - j` is one.
    """
    p = _prime_of(n)
    if p is None:
        return np.ones((1, 1), np.int8)
    character = np.full(p, -1, np.int8)
    character[np.arange(p) ** 2 % p] = 1
    character[0] = 0
    index = np.arange(p)
    c = np.ones((p + 1, p + 1), np.int8)
    c[0, 0] = 0
    c[1:, 1:] = character[(index[:, None] - index) % p]
    one = np.eye(p + 1, dtype=np.int8)
    if p % 4 == 3:
        c[1:, 0] = -1
        return c + one
    return np.kron(c, np.array([[1, 1], [1, -1]], np.int8)) + np.kron(
        one, np.array([[1, -1], [-1, -1]], np.int8)
    )
