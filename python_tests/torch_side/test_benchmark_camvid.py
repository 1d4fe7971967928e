"""The CamVid check trains on seen classes alone, and asks for words that nobody trained on."""

import importlib.util
import json
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


def test_a_few_steps_learn_the_halves(camvid, words, capsys):
    data = TwoClasses((0, 1))
    features = camvid.Features.compute(FakeSession(camvid.TAPS), data, None)
    two = camvid.Words(words.names, words.rows, words.encoder, words.seen[:2])
    head = camvid.train(features, two, seed=0, epochs=24)
    assert "step 6/6" in capsys.readouterr().out
    with torch.no_grad():
        tensors = {name: tensor[:1].float() for name, tensor in features.tensors.items()}
        found = head.word_logits(**tensors).argmax(1)[0]
    assert (found[:30] == 0).float().mean() > 0.9
    assert (found[-30:] == 1).float().mean() > 0.9


def test_embeddings_are_mixtures_of_words(camvid, words):
    head = camvid.WordHead(words).eval()
    generator = seeded(1)
    deep = torch.randn(1, 320, 33, 33, generator=generator)
    fine = torch.randn(1, 32, 65, 65, generator=generator)
    logits = torch.full((1, 21, 33, 33), -30.0)
    logits[:, 3] = 30.0  # the encoder is sure of its third word
    with torch.no_grad():
        embeds = head(deep, fine, logits)
        torch.testing.assert_close(embeds[0, :, 0, 0], words.encoder[2])
        logits[:, 0], logits[:, 3] = 30.0, -30.0  # now of background: the head's words count
        shares = head.word_logits(deep, fine, logits).softmax(1)[0, :, 7, 9]
        torch.testing.assert_close(head(deep, fine, logits)[0, :, 7, 9], shares @ words.seen)


def test_other_words_were_never_trained_on(camvid):
    voc = (
        "aeroplane airplane bicycle bird boat bottle bus car cat chair cow dining table dog horse "
    )
    voc += "motorbike motorcycle person potted plant sheep sofa couch train tv tvmonitor"
    for old, new in camvid.OTHER_WORDS.items():
        assert old in camvid.WORDS.values()
        for phrase in new.split(", "):
            assert phrase not in camvid.WORDS.values()
            assert phrase not in voc
    assert set(camvid.UNSEEN) < set(camvid.WORDS)


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


def test_summary_is_mean_and_deviation_over_seeds(camvid):
    def one(value):
        table = [{"asked_as": "sky", "iou_percent": value}]
        side = {"metrics_percent": {"hIoU": value, "mIoU(U)": None}, "classes": table}
        return {"words_of_training": {"first": side}, "other_words": side}

    summary = camvid.summarise([one(10.0), one(14.0)])["summary"]
    assert summary["other_words"]["hIoU"] == "12.00 +- 2.83"
    assert summary["words_of_training"] == {
        "hIoU": "12.00 +- 2.83", "mIoU(U)": "-", "IoU sky": "12.00 +- 2.83",
    }  # fmt: skip
    json.dumps(summary, allow_nan=False)


@pytest.fixture
def rows(camvid, monkeypatch):
    monkeypatch.setitem(sys.modules, "camvid", camvid)
    spec = importlib.util.spec_from_file_location(
        "camvid_rows", BENCHMARK.parent / "camvid_rows.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(camvid):
    """A table of CLIP's words with random rows, of which eight are taught."""
    names = list(camvid.WORDS.values())
    embeds = torch.nn.functional.normalize(torch.randn(11, 16, generator=seeded(3)), dim=1)
    taught = [row for row, name in enumerate(camvid.WORDS) if name not in camvid.UNSEEN]
    return camvid.Words(names, embeds, embeds[:20].repeat(2, 1)[:20], embeds[taught])


def test_self_training_uses_where_unseen_classes_are_and_not_which(camvid, rows, table):
    features = camvid.Features.compute(FakeSession(camvid.TAPS), TwoClasses((0, 1)), 1)
    head = camvid.WordHead(table).eval()
    names = list(camvid.WORDS)
    unseen = [names.index(name) for name in camvid.UNSEEN]
    seen = [row for row in range(len(names)) if row not in unseen]
    every = torch.full_like(features.labels, seen[0])
    every[:, 40:80], every[:, 80:90] = unseen[0], 255
    mixed = every.clone()
    mixed[:, 40:60] = unseen[2]
    found = rows.pseudo_labels(head, features, every, seen, table)
    assert torch.equal(found, rows.pseudo_labels(head, features, mixed, seen, table))
    assert set(found[:, 40:80].unique().tolist()) <= set(unseen)
    known = torch.ones(found.shape[1], dtype=torch.bool)
    known[40:80] = False
    assert torch.equal(found[:, known], every[:, known])


def test_a_bias_is_chosen_that_finds_the_names_left_out(camvid, rows, table, monkeypatch):
    """Seen names lead by a little everywhere; half of the photo shows the other one."""
    features = camvid.Features.compute(FakeSession(camvid.TAPS), TwoClasses((0, 1)), 1)
    logits = torch.zeros(1, 2, camvid.GRID, camvid.GRID)
    logits[:, 0] = 0.4
    logits[:, 0, : camvid.GRID // 2] = 3.0
    monkeypatch.setattr(rows, "_logits", lambda *_: logits)
    bias = rows.best_bias(camvid.WordHead(table), features, table.rows[:2], [0])
    assert bias in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    monkeypatch.setattr(rows, "_logits", lambda *_: 100 * (logits - 1.5))
    assert rows.best_bias(camvid.WordHead(table), features, table.rows[:2], [0]) == 0.0
