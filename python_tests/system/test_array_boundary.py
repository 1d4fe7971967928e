"""How Python objects become arrays of the native core: nothing is copied, nothing is leaked."""

import gc
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import require_cuda
from support.command_line import python
from support.errors import refused
from support.operations import OPERATIONS, as_type, f4
from zsseg_rt import _C, ops
from zsseg_rt.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from zsseg_rt.ops import reference

CPU = (1, 0)


def similarity(patch_embeds, text_embeds=None, out=None):
    text = np.eye(4, dtype=np.float32) if text_embeds is None else text_embeds
    return ops.patch_text_similarity(patch_embeds, text, normalize=False, out=out)


def embeds():
    return np.arange(12, dtype=np.float32).reshape(1, 3, 4)


class Producer:
    """A minimal owner of __dlpack__; ``versioned`` False is one that predates DLPack 1.0."""

    def __init__(self, array, *, versioned, device=CPU):
        self.array, self.versioned, self.device = array, versioned, device
        self.calls = []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, **more):
        self.calls.append({"stream": stream, **more})
        if more and not self.versioned:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(stream=stream, **more)


def test_strides_of_single_and_empty_axes_do_not_matter():
    rows = np.zeros((8, 6, 4), np.float32)[::8, ::2][:, :1]
    assert similarity(rows).shape == (1, 4, 1)
    assert similarity(np.zeros((1, 9, 4), np.float32)[:, ::3][:, :0]).shape == (1, 4, 0)
    assert similarity(misaligned(f4(1, 0, 4))).shape == (1, 4, 0)


def misaligned(array):
    """The same elements one byte past an address that is a multiple of their size."""
    memory = bytearray(array.nbytes + 2)
    view = np.frombuffer(memory, array.dtype, array.size, offset=1).reshape(array.shape)
    view[...] = array
    assert view.ctypes.data % array.itemsize
    return view


ARGUMENTS = [(operation, name) for operation in OPERATIONS for name in OPERATIONS[operation][0]]


@pytest.mark.parametrize("interface", ["buffer", "dlpack", "dlpack before 1.0"])
@pytest.mark.parametrize(("operation", "name"), ARGUMENTS)
def test_misaligned_arrays_are_refused(operation, name, interface):
    arrays, settings = OPERATIONS[operation]
    run = getattr(ops, operation)
    run(**arrays, **settings)
    array = misaligned(arrays[name]) if arrays[name].itemsize > 1 else arrays[name]
    if interface != "buffer":
        array = Producer(array, versioned=interface == "dlpack")
    changed = {**arrays, name: array}
    if arrays[name].itemsize == 1:  # lies at a multiple of its size everywhere
        run(**changed, **settings)
        return
    size = arrays[name].itemsize
    expected = rf"{name}: expected an address that is a multiple of {size}, .* got one 1 past a"
    with pytest.raises(ShapeError, match=expected):
        run(**changed, **settings)


def test_misaligned_results_of_two_are_refused():
    logits, out = f4(1, 300, 2, 2), (as_type("u2", 1, 4, 4), f4(1, 4, 4))
    for name, changed in (
        ("labels", (misaligned(out[0]), out[1])), ("scores", (out[0], misaligned(out[1]))),
    ):  # fmt: skip
        with refused(ShapeError, name):
            ops.upsample_argmax(logits, (4, 4), with_scores=True, out=changed)


def only_cuda_array_interface(interface):
    return SimpleNamespace(__cuda_array_interface__=interface)


class Liar(Producer):
    def __dlpack__(self, **_):
        return "a string"


ROWS = np.zeros((4, 6, 8), np.float32)
REFUSED = {
    **{f"strides {i}": (view, ShapeError)
       for i, view in enumerate([ROWS[:, ::2], ROWS.T, ROWS[..., ::-1]])},
    "strides by dlpack": (Producer(ROWS[:1, :3, ::2], versioned=True), ShapeError),
    **{kind: (np.zeros((1, 3, 4), kind), DTypeError)
       for kind in ("M8[s]", "m8[s]", "O", "U1", "u1,u1", ">f4", "c8")},
    "more axes than a view holds": (np.zeros((1, 1, 1, 1, 1), np.float32), ShapeError),
    "misaligned of another type": (misaligned(embeds().astype(">f4")), DTypeError),
    "misaligned on a GPU": (only_cuda_array_interface(
        {"data": (4097, False), "shape": (1, 3, 4), "typestr": "<f4", "version": 3}), ShapeError),
    "a device of another kind": (Producer(embeds(), versioned=True, device=(8, 0)), DeviceError),
    "no capsule": (Liar(embeds(), versioned=True), TypeError),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_arrays_are_refused(case):
    array, error = REFUSED[case]
    with pytest.raises(error, match=None if case == "no capsule" else "patch_embeds: "):
        similarity(array)


def test_results_are_written_in_place_or_their_place_is_refused():
    array = embeds()
    array.flags.writeable = False  # of input that is welcome
    for wrap in (lambda out: out, lambda out: Producer(out, versioned=True)):
        out = np.full((1, 4, 3), np.nan, np.float32)
        wrapped = wrap(out)
        assert similarity(array, out=wrapped) is wrapped
        np.testing.assert_array_equal(out[0], array[0].T)
        out.flags.writeable = False
        with refused(ShapeError, "out"):
            similarity(array, out=wrap(out))
    with refused(DTypeError, "out"):
        similarity(array, out="out")
    with refused(ArgumentError, "num_threads"):
        ops.set_num_threads(0)


def test_plain_buffers_serve_as_arrays_and_are_released():
    pixels = bytearray(b"\x80" * 12)
    frame = memoryview(pixels).cast("B", (2, 2, 3))
    out = ops.preprocess(frame, size_hw=(1, 1), mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_allclose(out, 128 / 255, rtol=1e-6)
    del frame
    pixels.append(0)  # BufferError while anything still holds the buffer


def test_no_reference_is_kept():
    array, out = embeds(), np.zeros((1, 4, 3), np.float32)
    before = sys.getrefcount(array), sys.getrefcount(out)
    for _ in range(10):
        similarity(array, out=out)
        with pytest.raises(ShapeError):
            similarity(array, out=out[0])
    gc.collect()
    assert (sys.getrefcount(array), sys.getrefcount(out)) == before


@pytest.mark.parametrize("versioned", [True, False])
def test_dlpack_producers_old_and_new_get_their_tensor_back(versioned):
    array = embeds()
    producer, alive = Producer(array, versioned=versioned), weakref.ref(array)
    np.testing.assert_array_equal(similarity(producer)[0], embeds()[0].T)
    first = {"stream": None, "max_version": (1, 0)}
    assert producer.calls == ([first] if versioned else [first, {"stream": None}])
    del producer, array
    gc.collect()
    assert alive() is None
    with pytest.raises(BufferError):  # NumPy's own: it lends no dates
        similarity(Producer(np.zeros((1, 3, 4), "M8[s]"), versioned=versioned))


def test_torch_tensors_are_read_and_written_in_place():
    torch = pytest.importorskip("torch")
    patches, out = torch.from_numpy(embeds()), torch.full((1, 4, 3), torch.nan)
    assert similarity(patches, out=out) is out
    np.testing.assert_array_equal(out[0].numpy(), embeds()[0].T)
    with refused(ShapeError, "patch_embeds"):
        similarity(patches.transpose(1, 2), text_embeds=np.zeros((1, 3), np.float32))
    np.testing.assert_array_equal(similarity(patches.bfloat16()), similarity(patches.half()))
    with refused(DTypeError, "patch_embeds"):
        similarity(patches.double())
    stack = torch.stack([torch.zeros(3, 4), patches[0]])
    np.testing.assert_array_equal(similarity(stack[1:])[0], embeds()[0].T)  # at its offset


@pytest.mark.parametrize("isa", [*ops.available_cpu_isas(), "v9"])
def test_instruction_set_is_chosen_by_the_environment(isa):
    code = "from zsseg_rt import ops; print(ops.cpu_isa())"
    result = python("-c", code, more_env={"ZSSEG_CPU_ISA": isa})
    said = "ArgumentError: ZSSEG_CPU_ISA: expected one of baseline"
    assert result.stdout.strip() == isa if isa != "v9" else said in result.stderr


def test_without_a_gpu_streams_and_arrays_say_so():
    if ops.cuda_device_count() > 0:
        pytest.skip("this computer has a CUDA device")
    makers = (ops.Stream, ops.Event, lambda: ops.DeviceArray.empty((2,), "float32"))
    for make in (*makers, lambda: _C.Capture(0), lambda: _C.PinnedArray((1,), np.uint8)):
        with refused(DeviceError, "device"):
            make()
    with pytest.raises(DeviceError):
        ops.cuda_device_properties(0)


@pytest.fixture
def cuda_stream():
    require_cuda()
    return ops.Stream(0)


@pytest.mark.needs_cuda
def test_device_array_round_trip(cuda_stream):
    theirs, start, stop = ops.Stream(0), ops.Event(0), ops.Event(0)
    start.record(theirs.handle)
    array = ops.DeviceArray.from_numpy(embeds(), stream=theirs.handle)
    stop.record(theirs.handle)
    stop.synchronize()
    assert start.elapsed_ms(stop) > 0
    del theirs  # the array outlives it
    gc.collect()
    assert (array.shape, array.dtype, array.device) == ((1, 3, 4), np.float32, "cuda:0")
    assert array.nbytes == 48
    np.testing.assert_array_equal(array.numpy(stream=cuda_stream.handle), embeds())
    out = np.zeros((1, 3, 4), np.float32)
    array.copy_from(embeds() + 1, stream=cuda_stream.handle)
    array.copy_to(out)
    np.testing.assert_array_equal(out, embeds() + 1)
    rows = array.view((2, 3)).numpy()
    np.testing.assert_array_equal(rows, (embeds() + 1).ravel()[:6].reshape(2, 3))
    with refused(ShapeError, "shape", "12", "13"):
        array.view((13,))
    with refused(DTypeError, "array", "float32", "float64"):
        array.copy_from(np.zeros((1, 3, 4)))
    for dtype in ("uint32", "uint64", "complex64"):
        with refused(DTypeError, "array"):
            ops.DeviceArray.from_numpy(np.zeros(3, dtype))
    with refused(DeviceError, "text_embeds"):  # of two devices
        similarity(array)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("interface", ["dlpack", "dlpack before 1.0", "cuda_array_interface"])
def test_arrays_written_on_another_stream_are_waited_for(cuda_stream, interface):
    theirs = ops.Stream(0)
    host = (embeds(), 2 * np.eye(4, dtype=np.float32))
    arrays = [ops.DeviceArray.from_numpy(array, 0, theirs.handle) for array in host]
    wrapped = [
        only_cuda_array_interface(array.__cuda_array_interface__)
        if interface == "cuda_array_interface"
        else Producer(array, versioned=interface == "dlpack", device=(2, 0))
        for array in arrays
    ]
    result = ops.patch_text_similarity(*wrapped, normalize=False, stream=cuda_stream.handle)
    np.testing.assert_array_equal(result.numpy(cuda_stream.handle)[0], 2 * embeds()[0].T)


@pytest.mark.needs_cuda
def test_torch_cuda_tensors_in_and_out(cuda_stream):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch cannot use the device")
    patches, text = torch.randn(2, 67, 33).cuda(), torch.randn(5, 33).cuda()
    torch.cuda.synchronize()
    result = ops.patch_text_similarity(patches, text, stream=cuda_stream.handle)
    back = torch.from_dlpack(result)
    assert back.is_cuda
    expected = reference.patch_text_similarity(patches.cpu().numpy(), text.cpu().numpy())
    np.testing.assert_allclose(back.cpu().numpy(), expected, rtol=0, atol=1e-6)
