"""Examples in docstrings of the public API: each class and function has one, and it is right."""

import doctest
import importlib
from typing import Any

import pytest

PACKAGES = ("cmx_jax", "cmx_jax.mesh", "cmx_jax.mesh.trace", "cmx_jax.testing")
PUBLIC = [
    pytest.param(value, id=f"{package}.{name}")
    for package in PACKAGES
    for name in importlib.import_module(package).__all__
    if callable(value := getattr(importlib.import_module(package), name))
]


@pytest.mark.parametrize("thing", PUBLIC)
@pytest.mark.slow
def test_example_runs(thing: Any) -> None:
    module = importlib.import_module(thing.__module__)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    test = parser.get_doctest(thing.__doc__, dict(vars(module)), thing.__qualname__, module.__file__, 0)
    assert test.examples, f"{thing.__qualname__} has no example"
    output: list[str] = []
    runner.run(test, out=output.append)
    assert "".join(output) == ""
