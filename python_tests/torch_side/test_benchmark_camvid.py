"""The CamVid check trains on seen classes alone, and asks for words that nobody trained on."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from support.graphs import write_graph

torch = pytest.importorskip("torch")

from zsseg_rt import Bundle  # noqa: E402
from zsseg_rt.evaluation.datasets.base import Sample  # noqa: E402

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "camvid.py"


@pytest.fixture(scope="module")
def camvid():
    spec = importlib.util.spec_from_file_location("camvid_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def words(camvid):
    rows = torch.nn.functional.normalize(torch.randn(32, 16, generator=seeded(0)), dim=1)
    return camvid.Words([f"word {i}" for i in range(32)], rows, rows[:20], rows[20:28])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class TwoClasses:
    """Pictures whose upper half is class 0; class 1 below is seen, or not."""

    name, class_names, ignore_label = "two", ("up", "down", "other"), 255

    def __init__(self, seen):
        self.seen = seen

    def __len__(self):
        return 2

    def __getitem__(self, index):
        labels = np.zeros((36, 48), np.uint8)
        labels[18:] = 1
        labels[:, :4] = 255
        return Sample(np.zeros((36, 48, 3), np.uint8), labels, str(index))


class FakeSession:
    """An encoder whose tensors tell upper from lower half."""

    inputs = (type("Spec", (), {"name": "pixel_values"}),)

    def __init__(self, taps):
        self.shapes = {"deep": (1, 320, 33, 33), "fine": (1, 32, 65, 65), "logits": (1, 21, 33, 33)}
        self.taps = taps

    def run(self, feeds):
        assert feeds["pixel_values"].shape == (1, 3, 513, 513)
        found = {}
        for name, shape in self.shapes.items():
            tensor = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
            tensor[:, :, : shape[2] // 2] += 1
            found[self.taps[name]] = tensor
        return found


def test_labels_of_unseen_classes_never_reach_training(camvid):
    session = FakeSession(camvid.TAPS)
    both = camvid.Features.compute(session, TwoClasses((0, 1)), None).labels
    assert set(both.unique().tolist()) == {0, 1, 255}
    upper = camvid.Features.compute(session, TwoClasses((0, 2)), 1).labels
    assert set(upper.unique().tolist()) == {0, 255}
    assert upper.shape == (1, camvid.LABEL_GRID, camvid.LABEL_GRID)
    assert torch.equal(upper[0] == 0, both[0] == 0)
    assert (upper[0] == 0).float().mean() == pytest.approx(0.5 * 44 / 48, abs=0.02)


def write_encoder(path, taps):
    """The taps of the benchmark's encoder, at their sizes, from one small graph."""
    sizes = {"deep": (320, 33), "fine": (32, 65), "logits": (21, 33)}
    nodes, weights, outputs = [], {}, {}
    for name, (channels, side) in sizes.items():
        weights[f"{name}.w"] = np.full((channels, 3, 1, 1), 0.1, np.float32)
        weights[f"{name}.hw"] = np.array([1, 3, side, side])
        inputs = ["pixel_values", "", "", f"{name}.hw"]
        nodes.append(helper.make_node("Resize", inputs, [f"{name}.small"], mode="nearest"))
        nodes.append(helper.make_node("Conv", [f"{name}.small", f"{name}.w"], [taps[name]]))
        outputs[taps[name]] = (TensorProto.FLOAT, [1, channels, side, side])
    image = {"pixel_values": (TensorProto.FLOAT, [1, 3, 513, 513])}
    return write_graph(path, nodes, image, outputs, weights)


def test_encoder_and_head_are_exported_as_one_graph(camvid, words, tmp_path):
    """onnx.compose lists the operator set once for each of the two."""
    head = camvid.WordHead(words).eval()
    encoder = write_encoder(tmp_path / "encoder.onnx", camvid.TAPS)
    path = camvid.export(head, words, encoder, tmp_path / "camvid.zsseg")
    bundle = Bundle.load(path)
    assert bundle.text_bank.names == tuple(words.names)
    graph = onnx.load(bundle.open_path(bundle.graph("image_encoder", "float32")))
    standard = [opset.version for opset in graph.opset_import if not opset.domain]
    assert standard == [camvid.OPSET]


@pytest.mark.needs_shared
def test_every_word_and_class_is_there(camvid, shared_dir):
    folder = shared_dir / "data" / "clip_text_embeddings" / "vitb16"
    words = camvid.Words.read(
        folder / "coco171_names.txt",
        folder / "coco_multi.npy",
        shared_dir / "data" / "encoders" / "deeplabv3_mnv2_voc_clipspace_train_text_rows.npy",
    )
    assert words.rows_of(list(camvid.WORDS.values())).shape == (11, 512)
    assert len(words.rows_of(list(camvid.OTHER_WORDS.values()))) == 12
    assert words.encoder.shape == (20, 512)
    torch.testing.assert_close(words.seen.norm(dim=1), torch.ones(8))
    shared = torch.nn.functional.normalize(words.rows.mean(0), dim=0)
    assert (words.seen @ shared).abs().max() < 1e-5
    data = camvid.create_dataset("camvid", shared_dir / "data" / "camvid", unseen=camvid.UNSEEN)
    assert tuple(camvid.WORDS) == data.class_names
    assert len(data.seen) == 8
