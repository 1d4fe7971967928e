"""Settings are checked when they are made."""

import pytest

from zsseg_rt import DeviceError, EngineConfig
from zsseg_rt.backends import registry
from zsseg_rt.common.files.home import default_cache_dir
from zsseg_rt.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "device: expected 'auto', 'cpu' or 'cuda:N', got 'gpu'"),
        ({"device": "cuda"}, "got 'cuda'"),
        ({"backend": "onnx"}, "backend: expected one of auto, openvino, tensorrt, torch"),
        ({"precision": "fp16"}, "precision: expected one of auto, float32, .*got 'fp16'"),
        ({"channel_order": "RGB"}, "channel_order: expected one of rgb, bgr"),
        ({"num_threads": -1}, "num_threads: expected from 0"),
        ({"num_threads": 1.5}, "num_threads: expected from 0"),
        ({"num_threads": 10**6}, "num_threads: expected from 0"),
        ({"unknown_below": 1.5}, r"unknown_below: expected a score in \[0, 1\]"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_from_dict_refuses_unknown_keys():
    assert EngineConfig.from_dict({"device": "cpu"}) == EngineConfig(device="cpu")
    with pytest.raises(ConfigError, match="unknown key 'devise'"):
        EngineConfig.from_dict({"devise": "cpu"})


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"num_threads": 10**5000},
            "num_threads: expected a 64-bit integer, got an overlong int",
        ),
        ({"num_threads": nested(5000)}, "num_threads: expected an integer, got an overlong list"),
        ({"num_threads": True}, "num_threads: expected an integer, got True"),
        (
            {"unknown_below": 10**400},
            "unknown_below: expected a number or|unknown_below: expected a f",
        ),
        ({"unknown_below": float("nan")}, "expected a finite number, got nan"),
        ({7: 1}, "unknown key 7"),
        ({"x" * 10_000: 1}, r"unknown key 'x+\.\.\."),
        ({"cache_dir": "a\0b"}, r"cache_dir: expected a path, got 'a\\x00b'"),
        ({"device": None}, "device: expected a string, got None"),
        ([("device", "cpu")], "EngineConfig: expected a dict, got list"),
        (None, "EngineConfig: expected a dict, got NoneType"),
    ],
)
def test_from_dict_refuses_wild_values(raw, message):
    with pytest.raises(ConfigError, match=message):
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
        with pytest.raises(ValueError, match="ZSSEG_BACKEND: expected one of .* got 'caffe'"):
            registry.choose(EngineConfig())

    def test_absent_gpu_is_an_error(self):
        with pytest.raises(DeviceError, match="expected one of 0 visible NVIDIA GPU.*'cuda:0'"):
            registry.choose(EngineConfig(device="cuda:0"))
        with pytest.raises(DeviceError, match="0 visible"):
            registry.choose(EngineConfig(backend="tensorrt"))

    def test_gpu_and_backend_must_fit(self, monkeypatch):
        monkeypatch.setattr("zsseg_rt.ops.cuda_device_count", lambda: 1)
        with pytest.raises(DeviceError, match="expected 'cpu' for backend 'openvino'"):
            registry.choose(EngineConfig(device="cuda:0", backend="openvino"))
        with pytest.raises(DeviceError, match="expected 'cuda:N' for backend 'tensorrt'"):
            registry.choose(EngineConfig(device="cpu", backend="tensorrt"))

    def test_gpu_takes_tensorrt_then_torch(self, monkeypatch):
        monkeypatch.setattr("zsseg_rt.ops.cuda_device_count", lambda: 2)
        monkeypatch.setattr(registry, "is_installed", lambda name: True)
        placement = registry.choose(EngineConfig(device="cuda:1"))
        assert (placement.backend, placement.device) == ("tensorrt", "cuda:1")
        monkeypatch.setattr(registry, "is_installed", lambda name: name != "tensorrt")
        assert registry.choose(EngineConfig(device="cuda:1")).backend == "torch"
