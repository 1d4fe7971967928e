"""Every example of docs/examples runs as it is, on what ships with the package."""

import csv
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from support.command_line import python
from tools.scenes import write_folder
from zsseg_rt.demo import demo_photos

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NOTEBOOK = EXAMPLES / "first_hour.ipynb"
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["onnx"] = None
for call in sys.argv[1:]:
    sys.argv = call.split("|")
    print(end="\x1e")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, call
"""
SAYS = {
    "evaluation": ["mIoU(S): ", "hardest: "],
    "first_labels": ["chair: ", "dining table: ", "mask.png: 530 rows of 730 labels"],
    "own_embeddings": ["sand: ", "sky: ", "mean score 0."],
    "swapping_classes": ["3 [", "4 [", "5 [", "6 [", "'star'", "'yellow sand'"],
    "two_lanes": ["'chair'", "'car'"],
    "webcam": ["frame ", " ms old: ", " labelled, "],
}
ELSEWHERE = {"counting_pixels", "own_encoder", "photo_folder", "hugging_face", "ros2_node"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    return tmp_path


def run(folder, *calls):
    """Output of examples, one after the other in a process without torch."""
    calls = ["|".join(map(str, (EXAMPLES / f"{name}.py", *rest))) for name, *rest in calls]
    place = {"ZSSEG_HOME": str(folder / "home")}
    done = python("-c", WITHOUT_TORCH, *calls, cwd=folder, more_env=place)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\x1e")[1:]


def test_every_example_is_listed_runs_and_helps_instead_of_starting_to_work(tmp_path):
    names = sorted({*SAYS, *ELSEWHERE, "triton_latency"})  # that one needs a server
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == names
    page = (EXAMPLES.parent / "python.md").read_text(encoding="utf-8")
    listed = re.findall(r"\[`(\w+)`\]\(examples/\1\.\w+\)", page)
    assert sorted(listed) == sorted([*names, NOTEBOOK.stem])
    for name, said in zip(names, run(tmp_path, *((n, "--help") for n in names)), strict=True):
        assert f"usage: {name}.py" in said
    assert list(tmp_path.iterdir()) == []
    scenes = write_folder(tmp_path / "scenes", {"val": 8})
    printed = run(tmp_path, *((name, scenes)[: 1 + (name == "evaluation")] for name in SAYS))
    for (name, texts), said in zip(SAYS.items(), printed, strict=True):
        assert (name, [text for text in texts if text not in said]) == (name, [])


def test_photo_folder_leaves_out_what_is_no_photo(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(demo_photos()[0], photos / "room.jpg")
    (photos / "broken.jpg").write_bytes(b"no photo")
    (said,) = run(tmp_path, ("photo_folder", photos))
    assert "room.jpg: chair, dining table" in said
    assert re.search(r"left out: .*broken\.jpg", said, re.DOTALL)
    written = {path.name for path in (tmp_path / "labelled").iterdir()}
    assert written == {"room.jpg", "room.labels.png", "shares.csv"}


def test_counts_cover_every_frame(tmp_path):
    run(tmp_path, ("counting_pixels", "test://?size=64x48&frames=5"))
    with (tmp_path / "counts.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:2] == ["frame", "seconds"]
    assert header[-1] == "unknown"
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4"]
    assert all(sum(map(int, row[2:])) == 64 * 48 for row in rows)


def test_own_encoder_becomes_a_bundle(home, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr(sys, "argv", ["own_encoder.py"])
    runpy.run_path(str(EXAMPLES / "own_encoder.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "agrees with the graph: True" in said
    assert [line.partition(":")[0] for line in said.splitlines()[-3:]] == ["grey", "red", "green"]
    assert (home / "colours.jpg").stat().st_size > 1000


def test_notebook_runs_and_holds_nothing_of_a_machine(home):
    assert list(EXAMPLES.glob("*.ipynb")) == [NOTEBOOK]
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not {"/home", "/root"} & set(re.findall(r"/\w+", text))
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert (home / "mask.png").stat().st_size > 100


def test_hugging_face_labels_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    (tmp_path / "photos").mkdir()
    shutil.copy(demo_photos()[0], tmp_path / "photos" / "room.jpg")
    (tmp_path / "photos" / "torn.jpg").write_bytes(b"no photo")
    done = python(EXAMPLES / "hugging_face.py", "photos", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    good, torn = datasets.load_from_disk(str(tmp_path / "out"))
    assert good["mask"].size == (730, 530)
    assert "chair" in [each["name"] for each in good["classes"]]
    assert "torn.jpg" in torn["error"]
    assert torn["mask"] is None


class Ros:
    """Stands for rclpy's node and messages, as far as the example uses them."""

    def __init__(self, *name, **fields):
        self.callbacks, self.published, self.errors = {}, [], []
        vars(self).update(fields)

    def declare_parameter(self, name, default):
        return SimpleNamespace(value=default)

    def create_publisher(self, kind, topic, qos):
        return SimpleNamespace(publish=lambda message: self.published.append((topic, message)))

    def create_subscription(self, kind, topic, callback, qos):
        self.callbacks[topic] = callback

    def add_on_set_parameters_callback(self, callback):
        self.callbacks["parameters"] = callback

    def get_logger(self):
        return SimpleNamespace(error=self.errors.append)


def test_ros2_node_labels_and_renames(monkeypatch):
    policy = SimpleNamespace(BEST_EFFORT=1, TRANSIENT_LOCAL=2)
    qos = {"QoSProfile": Ros, "DurabilityPolicy": policy, "ReliabilityPolicy": policy}
    modules = {
        "rclpy": {}, "rclpy.node": {"Node": Ros}, "rclpy.qos": qos, "rcl_interfaces": {},
        "rcl_interfaces.msg": {"SetParametersResult": SimpleNamespace}, "std_msgs": {},
        "std_msgs.msg": {"String": SimpleNamespace}, "sensor_msgs": {},
        "sensor_msgs.msg": {"Image": Ros},
    }  # fmt: skip
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    node = runpy.run_path(str(EXAMPLES / "ros2_node.py"))["LabelNode"]()
    rows = np.zeros((40, 3 * 60 + 5), np.uint8)  # rows may be padded
    image = Ros(header="h", height=40, width=60, step=185, data=rows.tobytes(), encoding="bgr8")
    node.callbacks["image"](image)
    topic, mask = node.published[-1]
    assert (topic, mask.header, mask.encoding, len(mask.data)) == ("labels", "h", "mono8", 2400)
    rename = node.callbacks["parameters"]
    assert rename([SimpleNamespace(name="classes", value="cat, bus")]).successful
    assert json.loads(node.published[-1][1].data)["names"] == ["cat", "bus"]
    assert not rename([SimpleNamespace(name="classes", value="cat, cat")]).successful
    image.encoding = "yuv422"
    node.callbacks["image"](image)
    assert "yuv422" in node.errors[0]
    node.engine.close()
