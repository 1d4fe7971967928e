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


@pytest.mark.parametrize(("name", "value"), [
    ("device", "cuda0"), ("device", 0), ("device", None), ("precision", 16),
    ("channel_order", "GBR"), ("num_threads", 1.5), ("num_threads", 10**6),
    ("max_candidates", 0), ("max_candidates", 1.5), ("max_candidates", "8"),
    ("with_class_scores", "high"), ("min_region_score", 1.5), ("max_windows", 0),
    ("resize", "crop"),
])  # fmt: skip
def test_bad_settings_are_refused(name, value):
    with refused(ConfigError, name):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(("name", "value", "meant"), [
    ("device", "cuda", "cuda:0"), ("device", "CPU", "cpu"), ("backend", "OpenVINO", "openvino"),
    ("precision", "fp16", "float16"), ("precision", "FP32", "float32"),
    ("precision", "bf16", "bfloat16"), ("channel_order", "BGR", "bgr"),
])  # fmt: skip
def test_other_spellings_of_a_setting_are_taken(name, value, meant):
    assert getattr(EngineConfig(**{name: value}), name) == meant
    assert EngineConfig(**{name: value}) == EngineConfig.from_dict({name: meant})


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(("raw", "message"), [
    ({"num_threads": 10**5000}, "EngineConfig.num_threads"),
    ({"num_threads": nested(5000)}, "EngineConfig.num_threads"),
    ({"num_threads": True}, "EngineConfig.num_threads"),
    ({"unknown_below": 10**400}, "EngineConfig.unknown_below"),
    ({"unknown_below": float("nan")}, "EngineConfig.unknown_below"),
    ({"device": None}, "EngineConfig.device"),
    *((raw, "EngineConfig") for raw in (
        {7: 1}, {"x" * 10_000: 1}, {"devise": "cpu"}, {"cache_dir": "a\0b"}, [("device", "cpu")],
        None,
    )),
])  # fmt: skip
def test_from_dict_refuses_wild_values(raw, message):
    with refused(ConfigError, message):
        EngineConfig.from_dict(raw)


def test_cache_folder_follows_home_and_switch(monkeypatch, tmp_path):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path
    assert EngineConfig().cache_folder == tmp_path
    assert EngineConfig(use_cache=False).cache_folder is None
    assert EngineConfig(cache_dir=tmp_path / "x").cache_folder == tmp_path / "x"


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs there are, of which there is none at first."""
    monkeypatch.delenv("ZSSEG_BACKEND", raising=False)
    monkeypatch.delenv("ZSSEG_DEVICE", raising=False)
    set_count = lambda n: monkeypatch.setattr("zsseg_rt.ops.cuda_device_count", lambda: n)  # noqa: E731
    set_count(0)
    return set_count


def placement(**settings):
    chosen = registry.choose(EngineConfig(**settings))
    return chosen.backend, chosen.device


def test_the_environment_is_read_for_auto_only(gpus, monkeypatch):
    assert placement() == ("openvino", "cpu")
    monkeypatch.setenv("ZSSEG_BACKEND", "torch")
    assert placement() == ("torch", "cpu")
    assert placement(backend="openvino") == ("openvino", "cpu")
    monkeypatch.setenv("ZSSEG_BACKEND", "caffe")
    with refused(ValueError, "ZSSEG_BACKEND"):
        placement()
    monkeypatch.delenv("ZSSEG_BACKEND")
    for word in ("cuda", "CUDA", "Cuda:0"):  # spelled as in a config
        monkeypatch.setenv("ZSSEG_DEVICE", word)
        assert registry.requested(EngineConfig()).device == "cuda:0"


def test_a_gpu_takes_tensorrt_then_torch_and_must_be_there(gpus, monkeypatch):
    for count, device, backend in (
        (0, "cuda:0", "auto"), (0, "auto", "tensorrt"),
        (1, "cuda:0", "openvino"), (1, "cpu", "tensorrt"),
    ):  # fmt: skip
        gpus(count)
        with refused(DeviceError, "device"):
            placement(device=device, backend=backend)
    gpus(2)
    monkeypatch.setattr(registry, "is_installed", lambda name: True)
    assert placement(device="cuda:1") == ("tensorrt", "cuda:1")
    monkeypatch.setattr(registry, "is_installed", lambda name: name != "tensorrt")
    assert placement(device="cuda:1") == ("torch", "cuda:1")


BACKENDS = {"openvino": _openvino.BACKEND, "torch": _torch.BACKEND, "tensorrt": _tensorrt.BACKEND}
F32, F16, BF16, INT8 = "float32", "float16", "bfloat16", "int8"
ANY, BOTH, FULL, HALF = (F16, BF16, F32), (F32, F16), (F32,), (F16,)
WITH_INT8, WITH_BF16 = (*BOTH, INT8), (*BOTH, BF16)

# (backend, machine): what the bundle holds, what is asked, graph and precision; none if refused
TABLE = {
    ("openvino", "avx2"): [
        (BOTH, "auto", F32, F32), (HALF, "auto", F16, F32), (BOTH, BF16), (BOTH, F16),
        (BOTH, INT8), (WITH_INT8, INT8), (WITH_INT8, "auto", F32, F32),
    ],
    ("openvino", "vnni"): [
        (WITH_INT8, INT8, INT8, INT8), (BOTH, BF16), (FULL, "auto", F32, F32),
    ],
    ("openvino", "amx"): [
        (WITH_INT8, INT8, INT8, INT8), (BOTH, "auto", F32, BF16), (BOTH, F32, F32, F32),
        (HALF, BF16), (WITH_BF16, BF16, F32, BF16), ((BF16,), "auto", BF16, BF16), ((BF16,), F32),
    ],
    ("openvino", "emulated"): [(BOTH, "auto", F32, F32), (BOTH, BF16, F32, BF16)],
    ("openvino", "arm"): [
        (BOTH, "auto", F32, F32), (BOTH, F16, F16, F16), (FULL, F16, F32, F16),
    ],
    ("torch", "cpu"): [
        (BOTH, "auto", F32, F32), (HALF, "auto", F16, F16), (BOTH, BF16, F32, BF16),
        (BOTH, F16, F16, F16), (HALF, F32),
    ],
    ("torch", "8.7"): [
        (BOTH, "auto", F16, F16), (FULL, "auto", F32, BF16), (BOTH, F32, F32, F32), (BOTH, "fp8"),
    ],
    ("torch", "7.5"): [
        (FULL, "auto", F32, F32), (BOTH, "auto", F16, F16), (FULL, BF16, F32, BF16),
    ],
    ("tensorrt", "8.7"): [
        (BOTH, "auto", F16, F16), (FULL, "auto", F32, F32), (WITH_BF16, BF16, BF16, BF16),
        (BOTH, BF16), (WITH_INT8, INT8, INT8, INT8), (WITH_INT8, "auto", F16, F16), (FULL, F16),
    ],
}  # fmt: skip


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


@pytest.mark.parametrize("row", [(*where, *row) for where, rows in TABLE.items() for row in rows])
def test_choice(choose, row):
    if len(row) == 4:
        with refused(PrecisionNotApplied, "precision"):
            choose(*row)
    else:
        assert choose(*row[:4]) == Choice(variant=row[4], precision=row[5])


@pytest.mark.parametrize(
    ("backend", "machine"), [("openvino", "amx"), ("torch", "8.7"), ("tensorrt", "8.7")]
)
def test_graphs_that_decide_within_themselves_stay_in_float32(choose, backend, machine):
    choice = choose(backend, machine, BOTH, "auto", allowed=FULL)
    assert choice == Choice(variant=F32, precision=F32)


@pytest.mark.parametrize(("backend", "machine"), TABLE)
def test_every_remedy_leads_somewhere(choose, backend, machine):
    bundles = (BOTH, FULL, HALF, (F16, INT8))
    for variants, asked, allowed in itertools.product(bundles, PRECISIONS, (ANY, FULL)):
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
        choose("openvino", "avx2", (INT8,), "auto")


@pytest.mark.parametrize(("line", "is_fast"), [
    ("flags\t\t: fpu sse2 fma avx2", False),
    ("flags\t\t: fpu avx2 avx512f avx512bw", False),
    ("flags\t\t: fpu avx2 avx_vnni", True),
    ("flags\t\t: fpu avx2 avx512f avx512_vnni", True),
    ("flags\t\t: fpu avx2 amx_bf16 amx_tile amx_int8", True),
    ("Features\t: fp asimd asimddp", True), ("Features\t: fp asimd", False),
    ("model name\t: avx512_vnni", False), ("", False),
])  # fmt: skip
def test_int8_is_fast_where_the_cpu_multiplies_bytes(line, is_fast):
    assert multiplies_bytes(f"processor\t: 0\n{line}\n") is is_fast
