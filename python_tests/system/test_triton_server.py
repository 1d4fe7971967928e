"""A bundle in a real Triton server; ``tools/machines/triton_check.sh`` runs it."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

if not os.environ.get("ZSSEG_TRITON_SERVER"):
    pytest.skip(
        "needs a Triton server: run tools/machines/triton_check.sh", allow_module_level=True
    )

import tritonclient.grpc
import tritonclient.http

from support.triton_server import serving
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.demo import demo_classes, demo_photos
from zsseg_rt.integrations.triton import write_triton_model
from zsseg_rt.photos import read_photo

DEFAULT = [["red ball", "ball"], *demo_classes("scenes")]
OTHERS = (["sand", "blue water, water", "grey sky"], ["wall", "floor"], ["star"])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    write_triton_model(Bundle.demo("scenes"), folder / "repository", name="demo", classes=DEFAULT)
    with serving(folder / "repository", folder / "log.txt") as running:
        yield running


@pytest.fixture(params=["http", "grpc"])
def ask(request, server):
    """A function that sends a frame and gets labels and names."""
    client = getattr(tritonclient, request.param)
    with client.InferenceServerClient(getattr(server, request.param)) as connection:
        yield lambda *question: infer(client, connection, *question)


@pytest.fixture(scope="module")
def frame():
    return read_photo(demo_photos("scenes")[0])


@pytest.fixture(scope="module")
def engine():
    with Engine(Bundle.demo("scenes"), EngineConfig(device="cpu")) as plain:
        yield plain


def infer(client, connection, frame, class_names=None):
    inputs = [client.InferInput("frame", frame.shape, "UINT8")]
    inputs[0].set_data_from_numpy(frame)
    if class_names is not None:
        texts = np.array([name.encode() for name in class_names], np.object_)
        inputs.append(client.InferInput("class_names", texts.shape, "BYTES"))
        inputs[1].set_data_from_numpy(texts)
    found = connection.infer("demo", inputs)
    return found.as_numpy("labels"), [name.decode() for name in found.as_numpy("names")]


def labels_of(engine, frame, names):
    engine.set_classes([name.split(", ") if isinstance(name, str) else name for name in names])
    return engine.segment(frame).labels


def test_requests_change_classes_and_sizes(ask, engine, frame):
    default = labels_of(engine, frame, DEFAULT)
    for names in (*OTHERS, OTHERS[0]):
        labels, found = ask(frame)
        assert found == [name if isinstance(name, str) else name[0] for name in DEFAULT]
        np.testing.assert_array_equal(labels, default)
        labels, found = ask(frame, names)
        assert found == [name.split(", ")[0] for name in names]
        np.testing.assert_array_equal(labels, labels_of(engine, frame, names))
    for height, width in ((1, 1), (719, 1281)):
        image = np.resize(frame, (height, width, 3))
        np.testing.assert_array_equal(ask(image)[0], labels_of(engine, image, DEFAULT))


def test_clients_do_not_see_each_other_s_classes(server, engine, frame):
    expected = [labels_of(engine, frame, names) for names in OTHERS]

    def talk(names, labels):
        with tritonclient.http.InferenceServerClient(server.http) as connection:
            for _ in range(10):
                found = infer(tritonclient.http, connection, frame, names)
                np.testing.assert_array_equal(found[0], labels)

    with ThreadPoolExecutor(len(OTHERS)) as pool:
        for done in [pool.submit(talk, *one) for one in zip(OTHERS, expected, strict=True)]:
            done.result()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one class"),
        (["wall", "wall"], "every name once"),
        (["a\x00b"], "plain text"),
        (["zebra"], "words that the bundle's text encoder learned"),
    ],
)
def test_errors_are_said_and_survived(ask, frame, names, message):
    with pytest.raises(tritonclient.utils.InferenceServerException, match=message) as found:
        ask(frame, names)
    assert found.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    with pytest.raises(tritonclient.utils.InferenceServerException, match="frame"):
        ask(frame[:, :, :2].copy())
    assert ask(frame, ["wall"])[1] == ["wall"]
