"""One small model, read once for the serving tests."""

import numpy as np
import pytest
from support import BASE

from cmx_jax.serving.model import Model


@pytest.fixture(scope="session")
def base() -> Model:
    return Model.read(BASE)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 64, length).tolist() for length in (3, 17, 1, 32, 9, 5, 21, 12, 2)]
