"""TF32 is off while a float32 graph runs, whatever the host program set, and is given back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch")

from zsseg_rt.backends._torch_settings import exact_float32  # noqa: E402

_has_newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def _settings() -> list[object]:
    """All that torch has about it; "mixed" where it refuses to say."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    asked: list[Callable[[], object]] = [
        lambda: matmul.allow_tf32,
        lambda: cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
    ]
    if _has_newer:
        places = (matmul, cudnn.conv, cudnn.rnn, cudnn, torch.backends)
        places = (*places, torch.backends.mkldnn.matmul)
        asked += [lambda place=place: place.fp32_precision for place in places]
    found = []
    for ask in asked:
        try:
            found.append(ask())
        except RuntimeError:
            found.append("mixed")
    return found


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = _settings()
    yield
    if _has_newer:
        torch.backends.fp32_precision = "none"
        cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    matmul.allow_tf32, cudnn.allow_tf32 = False, True
    if _has_newer:
        matmul.fp32_precision, cudnn.conv.fp32_precision = "none", "tf32"
        cudnn.rnn.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert _settings() == before


def _set(setting):
    """``place = value``, as a program would write it."""
    name, _, value = setting.partition(" = ")
    if name == "matmul precision":
        torch.set_float32_matmul_precision(value)
        return
    *path, last = name.split(".")
    place = torch.backends
    for each in path:
        place = getattr(place, each)
    setattr(place, last, value if last == "fp32_precision" else value == "True")


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("cuda.matmul.allow_tf32 = True",),
        ("cudnn.allow_tf32 = False",),
        ("matmul precision = high",),
        ("matmul precision = medium",),
        ("fp32_precision = tf32",),
        ("cuda.matmul.fp32_precision = tf32",),
        ("cudnn.fp32_precision = tf32", "cuda.matmul.allow_tf32 = True"),
        ("fp32_precision = tf32", "cuda.matmul.allow_tf32 = False"),
        ("cudnn.conv.fp32_precision = none",),
    ],
)
def test_settings_come_back_and_nothing_contradicts_inside(settings):
    if not _has_newer and any("fp32_precision" in setting for setting in settings):
        pytest.skip("needs torch 2.9's settings")
    for setting in settings:
        _set(setting)
    before = _settings()
    with exact_float32():
        assert torch.backends.cuda.matmul.allow_tf32 is False
        assert torch.backends.cudnn.allow_tf32 is False
        if _has_newer:
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert _settings() == before


def test_the_last_of_several_threads_gives_them_back():
    torch.backends.cuda.matmul.allow_tf32 = True
    second_is_in, first_is_out = threading.Event(), threading.Event()
    seen = []

    def second():
        with exact_float32():
            second_is_in.set()
            first_is_out.wait(10)
            seen.append(torch.backends.cuda.matmul.allow_tf32)

    other = threading.Thread(target=second)
    with exact_float32():
        other.start()
        assert second_is_in.wait(10)
    first_is_out.set()
    other.join(10)
    assert seen == [False]
    assert torch.backends.cuda.matmul.allow_tf32 is True
