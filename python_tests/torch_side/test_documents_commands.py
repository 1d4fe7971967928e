"""Commands in the documents work, one after the other, as a reader types them."""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import documents
from support.reader_folder import add_bundles, add_photos, add_run
from support.streams import numbered, write_video
from tools.scenes import write_folder
from zsseg_rt import Bundle, cli

# What is only parsed (test_documents.py), and why.
NOT_RUN = {
    r"^fetch \w|naclip|sfp-b16|openai|student": "needs a download of 600 MB or more",
    r"^import-checkpoint": "needs published weights; test_cli_import.py has small ones",
    r"rtsp:|csi:|cameras|^serve|^stream$": "needs a camera, or ends when somebody ends it",
    r"cuda": "needs a GPU",
    r"^profile": "measures for a minute; test_cli_profile.py measures shortly",
    r"^train --demo|--limit 300": "takes minutes",
    r"voc|VOC": "needs PASCAL VOC",
    r"\b(MODEL|ENCODER|RUN|FILE|B|D)\b": "has names in capitals for what is the reader's own",
    r"^build": "needs a GPU, or TensorRT-RTX; test_plan_builds.py has it",
    r"^quantize|small.zsseg": "needs eight pictures; test_quantize.py has them",
    r"--check-data": "finds classes without pixels in so few scenes",
    r"\bclip\b|dogs": "trains for minutes; the example below runs it shortly",
    r"^segment DIR": "leaves out what the text is not about",
}
# Other than 0: what a check finds, and what is not on every machine.
CODES = {"doctor": {0, 3, 4}}


def reason(words):
    line = " ".join(words)
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, line)), None)


def runnable():
    """The commands of each page in order; those that need nothing of the reader's once in all."""
    found, run = {}, []
    for page in documents.pages():
        for _, words in documents.commands_of(page, "zsseg-rt"):
            if reason(words) is None and words not in run:
                found.setdefault(page, []).append(words)
                is_free = {"--demo", "demo", "doctor", "fetch", "--recipes"} & set(words)
                run += [words] if is_free else []
    return found


RUN = runnable()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    add_bundles(folder)
    add_photos(folder)
    add_run(folder)
    write_folder(folder / "scenes", {"val": 4})
    write_video(folder / "street.mp4", map(numbered, range(4)))
    (folder / "zsseg_rt/demo").mkdir(parents=True)
    for name in ("scenes", "photos"):
        shutil.copytree(Bundle.demo(name).path, folder / f"zsseg_rt/demo/{name}.zsseg")
    shutil.copytree(folder / "street.zsseg", folder / "NAME.zsseg")
    return folder


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_commands_of_a_page_work_in_order(page, made, tmp_path, monkeypatch, capfd):
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("ZSSEG_HOME", str(made / "home"))
    for words in RUN[page]:
        given = [name for word in words for name in sorted(glob.glob(word)) or [word]]
        if words[0] == "stream" and "--frames" not in words:
            given += ["--frames", "8"]
        code = cli.main(given)
        printed = capfd.readouterr()
        assert code in CODES.get(words[0], {0}), f"{' '.join(words)}: {printed.err}{printed.out}"
        assert printed.out.strip(), f"{' '.join(words)}: printed nothing"
        for option in ("--out", "--json"):
            if option in words:
                path = tmp_path / "here" / words[words.index(option) + 1]
                assert path.exists(), " ".join(words)


def test_most_kinds_of_commands_are_run():
    kinds = {words[0] for calls in RUN.values() for words in calls}
    assert kinds >= {"doctor", "segment", "stream", "train", "export", "evaluate", "info"}


# --- the example that docs/training.md begins with, trained for three steps ---


PAGE = documents.ROOT / "docs" / "training.md"
SHORT = "zsseg-rt train --config dogs.toml --set loop.iterations=3 --set loop.batch_size=2"


def blocks():
    text = PAGE.read_text(encoding="utf-8")
    section = re.search(r"^## An example.*?(?=^## )", text, re.MULTILINE | re.DOTALL)[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_the_example_runs_from_photos_to_labels(whole, tmp_path):
    """Up to the check of the photos and masks, nightly to the end."""
    for folder in ("zsseg_rt", "tools"):
        (tmp_path / folder).symlink_to(documents.ROOT / folder)
    (settings,) = (code for language, code in blocks() if language == "toml")
    (tmp_path / "dogs.toml").write_text(settings)
    commands = "".join(code for language, code in blocks() if language == "bash")
    assert commands.count("--config dogs.toml\n") == 1
    commands = commands.replace("zsseg-rt train --config dogs.toml\n", f"{SHORT}\n")
    commands = commands.replace(" clip\n", " clip\nls clip/* | tail -n +9 | xargs rm\n", 1)
    if not whole:
        commands = commands.partition("--check-data")[0] + "--check-data"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    place = {"PATH": path, "PYTHONPATH": str(documents.ROOT), "ZSSEG_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, env=os.environ | place,
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "polygons").glob("*.json"))) == 8
    assert len((tmp_path / "dogs" / "val.txt").read_text().split()) == 2
    if not whole:
        return
    figures = json.loads((tmp_path / "runs" / "dogs" / "evaluations.json").read_text())
    assert figures
    assert len(list((tmp_path / "labelled").glob("*.mask.png"))) == 8
