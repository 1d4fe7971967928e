"""Which attention torch takes on a GPU: pinned for the whole process, chosen by what can run."""

import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from torch.backends import cuda  # noqa: E402

from support.errors import refused  # noqa: E402
from zsseg_rt.backends import _torch_settings as attention  # noqa: E402
from zsseg_rt.errors import ConfigError  # noqa: E402

HEADS = torch.zeros(1, 2, 3, 64, dtype=torch.float16)


def enabled():
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }


@pytest.mark.parametrize(
    ("setting", "order"),
    [
        (None, ("flash", "efficient")),
        ("efficient", ("efficient", "flash")),
        ("cudnn", ("cudnn", "flash", "efficient")),
    ],
)
def test_what_is_pinned_is_what_is_wanted(monkeypatch, setting, order):
    monkeypatch.delenv("ZSSEG_TORCH_ATTENTION", raising=False)
    if setting is not None:
        monkeypatch.setenv("ZSSEG_TORCH_ATTENTION", setting)
    before, priority = enabled(), torch._C._get_sdp_priority_order()
    members = torch.nn.attention.SDPBackend.__members__
    with attention.pinned_attention():
        assert enabled() == {kind: kind in order for kind in attention.KINDS}
        names = [f"{kind.upper()}_ATTENTION" for kind in order]
        first = torch._C._get_sdp_priority_order()[: len(order)]
        assert first == [int(members[name]) for name in names]
    assert (enabled(), torch._C._get_sdp_priority_order()) == (before, priority)


@pytest.mark.parametrize(("setting", "kinds"), [("flash", 2), ("efficient", 1), ("cudnn", 1)])
def test_a_torch_without_an_order_is_told_what_may_run(monkeypatch, setting, kinds):
    monkeypatch.setenv("ZSSEG_TORCH_ATTENTION", setting)
    full = torch.nn.attention.sdpa_kernel
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backends: full(backends))
    before = enabled()
    with attention.pinned_attention():
        allowed = [kind for kind, may_run in enabled().items() if may_run]
    assert setting in allowed
    assert len(allowed) == len(attention.wanted()) == kinds
    assert enabled() == before


def test_threads_share_the_pin_until_the_last_one_leaves():
    before, entered, leave = enabled(), threading.Event(), threading.Event()

    def other():
        with attention.pinned_attention():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with attention.pinned_attention():
        inside = enabled()
        thread.start()
        assert entered.wait(10)
    assert enabled() == inside
    leave.set()
    thread.join()
    assert enabled() == before


@pytest.mark.parametrize(
    ("able", "taken"),
    [
        ({"flash", "efficient"}, "flash"),
        ({"efficient"}, "efficient"),
        ({"cudnn"}, "unfused"),  # it was not asked for
        (set(), "unfused"),
    ],
)
def test_the_first_kind_that_can_run_is_taken(monkeypatch, able, taken):
    for kind in attention.KINDS:
        answer = kind in able
        monkeypatch.setattr(cuda, f"can_use_{kind}_attention", lambda given, a=answer: a)
    assert attention.kind_taken(HEADS, HEADS, HEADS, None) == taken


def test_another_kind_is_refused(monkeypatch):
    monkeypatch.setenv("ZSSEG_TORCH_ATTENTION", "math")
    with refused(ConfigError, "ZSSEG_TORCH_ATTENTION"):
        attention.wanted()
