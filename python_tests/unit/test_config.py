"""Settings are checked when they are made; every backend's graph and precision, by a table."""

import itertools
import re
from types import SimpleNamespace

import pytest

from support.cpus import CPUS, stand_in
from support.errors import refused
from zsseg_rt import EngineConfig
from zsseg_rt.backends import _openvino, _tensorrt, _torch, registry
from zsseg_rt.backends._openvino import multiplies_bytes
from zsseg_rt.backends.base import Choice
from zsseg_rt.common.files import default_cache_dir
from zsseg_rt.config import PRECISIONS
from zsseg_rt.errors import ConfigError, DeviceError, PrecisionNotApplied


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "cuda0"), ("device", 0), ("device", None), ("precision", 16),
        ("channel_order", "GBR"), ("num_threads", 1.5), ("num_threads", 10**6),
        ("max_candidates", 0), ("max_candidates", 1.5), ("max_candidates", "8"),
        ("with_class_scores", "high"), ("min_region_score", 1.5), ("max_windows", 0),
        ("resize", "crop"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(name, value):
    with refused(ConfigError, name):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "meant"),
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
def test_other_spellings_of_a_setting_are_taken(name, value, meant):
    assert getattr(EngineConfig(**{name: value}), name) == meant
    assert EngineConfig(**{name: value}) == EngineConfig.from_dict({name: meant})


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
        ({"devise": "cpu"}, "EngineConfig"),
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

    @pytest.mark.parametrize(
        ("gpus", "device", "backend"),
        [
            (0, "cuda:0", "auto"), (0, "auto", "tensorrt"),
            (1, "cuda:0", "openvino"), (1, "cpu", "tensorrt"),
        ],
    )  # fmt: skip
    def test_gpu_and_backend_must_be_there_and_fit(self, monkeypatch, gpus, device, backend):
        monkeypatch.setattr("zsseg_rt.ops.cuda_device_count", lambda: gpus)
        with refused(DeviceError, "device"):
            registry.choose(EngineConfig(device=device, backend=backend))

    def test_gpu_takes_tensorrt_then_torch(self, monkeypatch):
        monkeypatch.setattr("zsseg_rt.ops.cuda_device_count", lambda: 2)
        monkeypatch.setattr(registry, "is_installed", lambda name: True)
        placement = registry.choose(EngineConfig(device="cuda:1"))
        assert (placement.backend, placement.device) == ("tensorrt", "cuda:1")
        monkeypatch.setattr(registry, "is_installed", lambda name: name != "tensorrt")
        assert registry.choose(EngineConfig(device="cuda:1")).backend == "torch"


ANY = ("float16", "bfloat16", "float32")
BACKENDS = {"openvino": _openvino.BACKEND, "torch": _torch.BACKEND, "tensorrt": _tensorrt.BACKEND}
BOTH, FULL, HALF = ("float32", "float16"), ("float32",), ("float16",)

# (backend, machine, what the bundle holds, what is asked) -> (graph, precision), None if refused
TABLE = [
    ("openvino", "avx2", BOTH, "auto", ("float32", "float32")),
    ("openvino", "avx2", HALF, "auto", ("float16", "float32")),
    ("openvino", "avx2", BOTH, "bfloat16", None),
    ("openvino", "avx2", BOTH, "float16", None),
    ("openvino", "avx2", BOTH, "int8", None),
    ("openvino", "avx2", (*BOTH, "int8"), "int8", None),
    ("openvino", "avx2", (*BOTH, "int8"), "auto", ("float32", "float32")),
    ("openvino", "vnni", (*BOTH, "int8"), "int8", ("int8", "int8")),
    ("openvino", "vnni", BOTH, "bfloat16", None),
    ("openvino", "vnni", FULL, "auto", ("float32", "float32")),
    ("openvino", "amx", (*BOTH, "int8"), "int8", ("int8", "int8")),
    ("openvino", "amx", BOTH, "auto", ("float32", "bfloat16")),
    ("openvino", "amx", BOTH, "float32", ("float32", "float32")),
    ("openvino", "amx", HALF, "bfloat16", None),
    ("openvino", "emulated", BOTH, "auto", ("float32", "float32")),
    ("openvino", "emulated", BOTH, "bfloat16", ("float32", "bfloat16")),
    ("openvino", "amx", (*BOTH, "bfloat16"), "bfloat16", ("float32", "bfloat16")),
    ("openvino", "amx", ("bfloat16",), "auto", ("bfloat16", "bfloat16")),
    ("openvino", "amx", ("bfloat16",), "float32", None),
    ("openvino", "arm", BOTH, "auto", ("float32", "float32")),
    ("openvino", "arm", BOTH, "float16", ("float16", "float16")),
    ("openvino", "arm", FULL, "float16", ("float32", "float16")),
    ("torch", "cpu", BOTH, "auto", ("float32", "float32")),
    ("torch", "cpu", HALF, "auto", ("float16", "float16")),
    ("torch", "cpu", BOTH, "bfloat16", ("float32", "bfloat16")),
    ("torch", "cpu", BOTH, "float16", ("float16", "float16")),
    ("torch", "cpu", HALF, "float32", None),
    ("torch", "8.7", BOTH, "auto", ("float16", "float16")),
    ("torch", "8.7", FULL, "auto", ("float32", "bfloat16")),
    ("torch", "7.5", FULL, "auto", ("float32", "float32")),
    ("torch", "7.5", BOTH, "auto", ("float16", "float16")),
    ("torch", "7.5", FULL, "bfloat16", ("float32", "bfloat16")),
    ("torch", "8.7", BOTH, "float32", ("float32", "float32")),
    ("torch", "8.7", BOTH, "fp8", None),
    ("tensorrt", "8.7", BOTH, "auto", ("float16", "float16")),
    ("tensorrt", "8.7", FULL, "auto", ("float32", "float32")),
    ("tensorrt", "8.7", (*BOTH, "bfloat16"), "bfloat16", ("bfloat16", "bfloat16")),
    ("tensorrt", "8.7", BOTH, "bfloat16", None),
    ("tensorrt", "8.7", (*BOTH, "int8"), "int8", ("int8", "int8")),
    ("tensorrt", "8.7", (*BOTH, "int8"), "auto", ("float16", "float16")),
    ("tensorrt", "8.7", FULL, "float16", None),
]


@pytest.fixture
def choose(monkeypatch):
    def on(backend, machine, variants, asked, allowed=ANY):
        if machine in CPUS:
            stand_in(monkeypatch, machine)
        properties = {"compute_capability": machine}
        native = SimpleNamespace(cuda_device_properties=lambda index: properties)
        monkeypatch.setattr(_torch, "core", native)
        device = "cpu" if machine == "cpu" or machine in CPUS else "cuda:0"
        return BACKENDS[backend].choose(variants, asked, device=device, allowed=allowed)

    return on


@pytest.mark.parametrize(("backend", "machine", "variants", "asked", "choice"), TABLE)
def test_choice(choose, backend, machine, variants, asked, choice):
    if choice is None:
        with refused(PrecisionNotApplied, "precision"):
            choose(backend, machine, variants, asked)
    else:
        variant, precision = choice
        assert choose(backend, machine, variants, asked) == Choice(
            variant=variant, precision=precision
        )


@pytest.mark.parametrize(
    ("backend", "machine"), [("openvino", "amx"), ("torch", "8.7"), ("tensorrt", "8.7")]
)
def test_graphs_that_decide_within_themselves_stay_in_float32(choose, backend, machine):
    choice = choose(backend, machine, BOTH, "auto", allowed=("float32",))
    assert choice == Choice(variant="float32", precision="float32")


MACHINES = [("openvino", name) for name in CPUS]
MACHINES += [("torch", "cpu"), ("torch", "7.5"), ("torch", "8.7"), ("tensorrt", "8.7")]


@pytest.mark.parametrize(("backend", "machine"), MACHINES)
def test_every_remedy_leads_somewhere(choose, backend, machine):
    bundles = (BOTH, FULL, HALF, ("float16", "int8"))
    for variants, asked, allowed in itertools.product(bundles, PRECISIONS, (ANY, ("float32",))):
        try:
            choose(backend, machine, variants, asked, allowed)
        except PrecisionNotApplied as error:
            proposed = re.search(r"Use precision='(\w+)'", str(error))
            listed = re.search(r"for this bundle \(([^)]+)\)", str(error))
            for name in (proposed[1], *(listed[1].split(", ") if listed else ())):
                choose(backend, machine, variants, name, allowed)


def test_what_cannot_be_chosen_at_all_is_refused(choose):
    with refused(DeviceError, "device"):
        choose("openvino", "8.7", BOTH, "auto")
    with refused(PrecisionNotApplied, "precision"):
        choose("openvino", "avx2", ("int8",), "auto")


@pytest.mark.parametrize(
    ("line", "is_fast"),
    [
        ("flags\t\t: fpu sse2 fma avx2", False),
        ("flags\t\t: fpu avx2 avx512f avx512bw", False),
        ("flags\t\t: fpu avx2 avx_vnni", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile amx_int8", True),
        ("Features\t: fp asimd asimddp", True),
        ("Features\t: fp asimd", False),
        ("model name\t: avx512_vnni", False),
        ("", False),
    ],
)
def test_int8_is_fast_where_the_cpu_multiplies_bytes(line, is_fast):
    assert multiplies_bytes(f"processor\t: 0\n{line}\n") is is_fast
