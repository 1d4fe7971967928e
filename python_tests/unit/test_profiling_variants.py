"""What ``--against`` of the profiler means."""

import pytest

from support.errors import refused
from zsseg_rt import Bundle, EngineConfig
from zsseg_rt.errors import ConfigError
from zsseg_rt.profiling.variants import Variant, read_against


@pytest.fixture
def base():
    return Variant(name="scenes.zsseg", bundle=Bundle.demo("scenes").path)


def test_a_pair_of_numbers_is_one_value(base):
    config = EngineConfig.from_dict(read_against("cosine_weight=0:0.3,threads=2", base).config)
    assert (config.cosine_weight, config.num_threads) == ((0.0, 0.3), 2)


@pytest.mark.parametrize("pair", ["0.3", "0:x", "0:1:2", "0:7"])
def test_what_is_no_pair_is_refused(base, pair):
    with refused(ConfigError, "--against"):
        read_against(f"cosine_weight={pair}", base)
