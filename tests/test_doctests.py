"""The examples in docstrings run, module by module, under their installed names."""

import doctest
import importlib

import pytest
from test_imports import MODULES

SKIPPED = {"smcscale.__main__"}  # importing it is a command


@pytest.mark.parametrize("name", [n for n in MODULES if n not in SKIPPED])
def test_examples_in_docstrings_run(name):
    text = MODULES[name].read_text(encoding="utf-8")
    if ">>>" not in text:
        return
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0, f"{name} has >>> in no docstring that doctest finds"
    assert result.failed == 0
