"""Every annotation of the project is checked at run time while tests run."""

import os

import hypothesis
import jaxtyping
import pytest

import support.checking  # noqa: F401  named in the hook below
from support.room import make_room

# before the first import of the project: jaxtyping rewrites modules as they load
if os.environ.get("SMCSCALE_CHECK_TYPES", "0") != "0":  # set by `make test`
    jaxtyping.install_import_hook("smcscale", "support.checking.checked")

os.environ.setdefault("MPLBACKEND", "agg")  # pictures without a screen

# examples do not change from run to run, so a failure is never a matter of luck; `make fuzz` draws
# new ones, and many
hypothesis.settings.register_profile(
    "default", derandomize=True, deadline=None, max_examples=20, database=None
)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _room_for_compiled_code():
    yield
    make_room()
