"""Every operation against its reference, for arguments that hypothesis thinks of.

Apart from test_ops_contract, whose cases run on GPU machines without hypothesis, too.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CpuDevice
from support.operation_cases import MAKERS, Draw, check_call


@pytest.mark.nightly
@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_reference(name, data):
    draw = Draw(lambda options: data.draw(st.sampled_from(options)))
    check_call(name, CpuDevice(), MAKERS[name](draw))
