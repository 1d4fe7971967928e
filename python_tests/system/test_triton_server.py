"""A bundle in a real Triton server; ``tools/machines/triton_check.sh`` runs it.

``ZSSEG_TRITON_SERVER`` names its program; ``ZSSEG_TRITON_BACKENDS`` and ``ZSSEG_TRITON_LIBRARIES``
its folders, where it does not find them itself.
"""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress

import numpy as np
import pytest

if not os.environ.get("ZSSEG_TRITON_SERVER"):
    pytest.skip(
        "needs a Triton server: run tools/machines/triton_check.sh", allow_module_level=True
    )

import tritonclient.http as client
from tritonclient.utils import InferenceServerException

from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.demo import demo_classes, demo_photos
from zsseg_rt.integrations.triton import write_triton_model
from zsseg_rt.photos import read_photo

DEFAULT = [["red ball", "ball"], *demo_classes("scenes")]
OTHERS = (["sand", "blue water, water", "grey sky"], ["wall", "floor"], ["star"])


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """A function that sends a frame to a running server and gets labels and names."""
    folder = tmp_path_factory.mktemp("triton")
    write_triton_model(Bundle.demo("scenes"), folder / "repository", name="demo", classes=DEFAULT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    call = [os.environ["ZSSEG_TRITON_SERVER"], f"--model-repository={folder / 'repository'}"]
    call += [f"--http-port={port}", "--http-address=127.0.0.1"]
    call += ["--allow-grpc=false", "--allow-metrics=false"]
    if backends := os.environ.get("ZSSEG_TRITON_BACKENDS"):
        call.append(f"--backend-directory={backends}")
    libraries = os.environ.get("ZSSEG_TRITON_LIBRARIES")
    environment = os.environ | ({"LD_LIBRARY_PATH": libraries} if libraries else {})
    process = subprocess.Popen(call, env=environment, start_new_session=True)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/v2/health/ready", process)
        with client.InferenceServerClient(f"127.0.0.1:{port}") as connection:
            yield lambda *question: infer(connection, *question)
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the processes of its models, too
        process.wait()


def wait_until_ready(url, process, seconds=120.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"tritonserver is not ready: {process.poll()}")


def infer(connection, frame, class_names=None):
    inputs = [client.InferInput("frame", frame.shape, "UINT8")]
    inputs[0].set_data_from_numpy(frame)
    if class_names is not None:
        texts = np.array([name.encode() for name in class_names], np.object_)
        inputs.append(client.InferInput("class_names", texts.shape, "BYTES"))
        inputs[1].set_data_from_numpy(texts)
    answer = connection.infer("demo", inputs)
    return answer.as_numpy("labels"), [name.decode() for name in answer.as_numpy("names")]


def labels_of(engine, frame, names):
    engine.set_classes([name.split(", ") if isinstance(name, str) else name for name in names])
    return engine.segment(frame).labels


def test_requests_change_classes_and_sizes_and_errors_are_survived(ask):
    frame = read_photo(demo_photos("scenes")[0])
    with Engine(Bundle.demo("scenes"), EngineConfig(device="cpu")) as engine:
        default = labels_of(engine, frame, DEFAULT)
        for names in (*OTHERS, OTHERS[0]):
            labels, names_out = ask(frame)
            assert names_out == [name if isinstance(name, str) else name[0] for name in DEFAULT]
            np.testing.assert_array_equal(labels, default)
            labels, names_out = ask(frame, names)
            assert names_out == [name.split(", ")[0] for name in names]
            np.testing.assert_array_equal(labels, labels_of(engine, frame, names))
        for height, width in ((1, 1), (719, 1281)):
            image = np.resize(frame, (height, width, 3))
            np.testing.assert_array_equal(ask(image)[0], labels_of(engine, image, DEFAULT))
    for question, message in (
        ((frame, []), "at least one class"),
        ((frame, ["a\x00b"]), "plain"),
        ((frame[:, :, :2].copy(),), "frame"),
    ):
        with pytest.raises(InferenceServerException, match=message):
            ask(*question)
    assert ask(frame, ["wall"])[1] == ["wall"]
