"""Several hundred mutations of the kinds of `make fuzz`: each handled, or refused with a UserError."""

import pytest
from fuzz import explore
from fuzz_targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_fuzz(name):
    counts = explore(name, TARGETS[name].few, seed=0)
    assert counts.accepted + counts.refused >= TARGETS[name].few
    assert counts.refused > 0
