"""Settings are checked when they are made."""

import pytest

from support.errors import refused
from zsseg_rt import DeviceError, EngineConfig
from zsseg_rt.backends import registry
from zsseg_rt.common.files import default_cache_dir
from zsseg_rt.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda0"}, "device"),
        ({"device": 0}, "device"),
        ({"device": None}, "device"),
        ({"precision": 16}, "precision"),
        ({"channel_order": "GBR"}, "channel_order"),
        ({"num_threads": 1.5}, "num_threads"),
        ({"num_threads": 10**6}, "num_threads"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with refused(ConfigError, message):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("device", "cuda", "cuda:0"),
        ("device", "CPU", "cpu"),
        ("backend", "OpenVINO", "openvino"),
        ("precision", "fp16", "float16"),
        ("precision", "FP32", "float32"),
        ("precision", "bf16", "bfloat16"),
        ("channel_order", "BGR", "bgr"),
    ],
)
def test_other_spellings_of_a_setting_are_taken(name, given, meant):
    assert getattr(EngineConfig(**{name: given}), name) == meant
    assert EngineConfig(**{name: given}) == EngineConfig.from_dict({name: meant})


def test_from_dict_refuses_unknown_keys():
    assert EngineConfig.from_dict({"device": "cpu"}) == EngineConfig(device="cpu")
    with refused(ConfigError, "EngineConfig"):
        EngineConfig.from_dict({"devise": "cpu"})


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"num_threads": 10**5000}, "EngineConfig.num_threads"),
        ({"num_threads": nested(5000)}, "EngineConfig.num_threads"),
        ({"num_threads": True}, "EngineConfig.num_threads"),
        ({"unknown_below": 10**400}, "EngineConfig.unknown_below"),
        ({"unknown_below": float("nan")}, "EngineConfig.unknown_below"),
        ({7: 1}, "EngineConfig"),
        ({"x" * 10_000: 1}, "EngineConfig"),
        ({"cache_dir": "a\0b"}, "EngineConfig"),
        ({"device": None}, "EngineConfig.device"),
        ([("device", "cpu")], "EngineConfig"),
        (None, "EngineConfig"),
    ],
)
def test_from_dict_refuses_wild_values(raw, message):
    with refused(ConfigError, message):
        EngineConfig.from_dict(raw)


def test_cache_folder_follows_home_and_switch(monkeypatch, tmp_path):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path
    assert EngineConfig().cache_folder == tmp_path
    assert EngineConfig(use_cache=False).cache_folder is None
    assert EngineConfig(cache_dir=tmp_path / "x").cache_folder == tmp_path / "x"


class TestChoose:
    @pytest.fixture(autouse=True)
    def no_gpu(self, monkeypatch):
        monkeypatch.delenv("ZSSEG_BACKEND", raising=False)
        monkeypatch.delenv("ZSSEG_DEVICE", raising=False)
        monkeypatch.setattr("zsseg_rt.ops.cuda_device_count", lambda: 0)

    def test_auto_without_gpu_is_openvino_on_the_cpu(self):
        placement = registry.choose(EngineConfig())
        assert (placement.backend, placement.device) == ("openvino", "cpu")

    def test_environment_is_read_for_auto_only(self, monkeypatch):
        monkeypatch.setenv("ZSSEG_BACKEND", "torch")
        assert registry.choose(EngineConfig()).backend == "torch"
        assert registry.choose(EngineConfig(backend="openvino")).backend == "openvino"
        monkeypatch.setenv("ZSSEG_BACKEND", "caffe")
        with refused(ValueError, "ZSSEG_BACKEND"):
            registry.choose(EngineConfig())

    @pytest.mark.parametrize("word", ["cuda", "CUDA", "Cuda:0"])
    def test_a_gpu_of_the_environment_may_be_spelled_as_in_a_config(self, monkeypatch, word):
        monkeypatch.setenv("ZSSEG_DEVICE", word)
        assert registry.requested(EngineConfig()).device == "cuda:0"

    def test_absent_gpu_is_an_error(self):
        with refused(DeviceError, "device"):
            registry.choose(EngineConfig(device="cuda:0"))
        with refused(DeviceError, "device"):
            registry.choose(EngineConfig(backend="tensorrt"))

    def test_gpu_and_backend_must_fit(self, monkeypatch):
        monkeypatch.setattr("zsseg_rt.ops.cuda_device_count", lambda: 1)
        with refused(DeviceError, "device"):
            registry.choose(EngineConfig(device="cuda:0", backend="openvino"))
        with refused(DeviceError, "device"):
            registry.choose(EngineConfig(device="cpu", backend="tensorrt"))

    def test_gpu_takes_tensorrt_then_torch(self, monkeypatch):
        monkeypatch.setattr("zsseg_rt.ops.cuda_device_count", lambda: 2)
        monkeypatch.setattr(registry, "is_installed", lambda name: True)
        placement = registry.choose(EngineConfig(device="cuda:1"))
        assert (placement.backend, placement.device) == ("tensorrt", "cuda:1")
        monkeypatch.setattr(registry, "is_installed", lambda name: name != "tensorrt")
        assert registry.choose(EngineConfig(device="cuda:1")).backend == "torch"
