"""README and docs say what is so: snippets run, commands work in order, links lead somewhere."""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

pytest.importorskip("torch")

from support import documents
from support.reader_folder import NAMES, add_bundles, add_photos, add_run
from support.streams import numbered, write_video
from tools.docs import settings
from tools.scenes import SceneDataset, write_folder
from zsseg_rt import Bundle, Engine, cli
from zsseg_rt.photos import read_photo

PAGES = documents.pages()
WITH_PYTHON = [page for page in PAGES if documents.programs_of(page)]
COMMANDS = [call for page in PAGES for call in documents.commands_of(page, "zsseg-rt")]


def name_of(page):
    return page.relative_to(documents.ROOT).as_posix()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache of the documents' own, so that phrases are embedded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZSSEG_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch, home):
    add_photos(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def value_of(name, folder):
    if name == "frame":
        return read_photo(folder / "street.jpg")
    if name == "dataset":
        return SceneDataset("train", length=16)
    assert name == "engine", f"{name}: add what it stands for"
    engine = Engine(folder / "street.zsseg")
    engine.set_classes(NAMES[:2])
    return engine


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_runs(page, folder):
    blocks = documents.programs_of(page)
    code = "\n".join(block.code for block in blocks)
    taken = ".zsseg" in code or '"sfp-b16"' in code
    if taken or any("engine" in block.given for block in blocks):
        add_bundles(folder)
    if "photos.toml" in code:
        add_run(folder)
    names = {name: value_of(name, folder) for block in blocks for name in block.given}
    for block in blocks:
        lines = "\n" * (block.line - 1) + block.code
        exec(compile(lines, block.page, "exec"), names)
    if isinstance(names.get("engine"), Engine):
        names["engine"].close()


def without_work(command):
    """The command line, all of which only parses."""
    for inner in getattr(command, "commands", {}).values():
        without_work(inner)
    if not getattr(command, "commands", None):
        command.callback = lambda **settings: 0
    return command


@pytest.fixture(scope="module")
def parser():
    return without_work(typer.main.get_command(cli.app))


def parse(parser, words, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cli, "app", lambda **options: parser(**options))
        return cli.main(words)


@pytest.mark.parametrize(("where", "words"), COMMANDS)
def test_command_parses(where, words, parser, monkeypatch, capsys):
    assert parse(parser, words, monkeypatch) == 0, f"{where}: {capsys.readouterr().err}"


@pytest.mark.parametrize("words", [["segment", "--absent", "x"], ["absent"], ["train", "--seed"]])
def test_wrong_commands_do_not_parse(words, parser, monkeypatch):
    assert parse(parser, words, monkeypatch) == 2


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_scripts_links_and_lines_of_a_page(page):
    text = page.read_text(encoding="utf-8")
    unread = documents.unread_lines_of(page, "zsseg-rt")
    assert [line for line in unread if "..." not in line] == []
    for block in documents.blocks_of(page):
        assert not block.not_run or block.language == "python", block.line
        assert (block.not_run or "needs ").startswith("needs "), block.line
    for script in re.findall(r"\b(?:tools|benchmarks|docs/examples)/[\w/]+\.(?:sh|py)\b", text):
        assert (documents.ROOT / script).is_file(), script
    for link in documents.links_of(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in documents.anchors_of(target), link
    assert [line for line in text.splitlines() if len(line) > 140] == []


def test_the_lists_of_settings_are_current():
    page = settings.PAGE.read_text(encoding="utf-8")
    assert settings.with_lists(page) == page, "run python -m tools.docs.settings"


def test_readme_links_every_page():
    readme = documents.ROOT / "README.md"
    linked = {link.partition("#")[0] for link in documents.links_of(readme)}
    assert {name_of(page) for page in PAGES if page.parent.name == "docs"} <= linked


# --- commands, one after the other, as a reader types them ---

# What is only parsed, and why.
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


def runnable():
    """The commands of each page in order; those that need nothing of the reader's once in all."""
    by_page, run = {}, []
    for page in PAGES:
        for _, words in documents.commands_of(page, "zsseg-rt"):
            needs = any(re.search(pattern, " ".join(words)) for pattern in NOT_RUN)
            if not needs and words not in run:
                by_page.setdefault(page, []).append(words)
                is_free = {"--demo", "demo", "doctor", "fetch", "--recipes"} & set(words)
                run += [words] if is_free else []
    return by_page


RUN = runnable()


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory):
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
def test_commands_of_a_page_work_in_order(page, reader_folder, tmp_path, monkeypatch, capfd):
    shutil.copytree(reader_folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("ZSSEG_HOME", str(reader_folder / "home"))
    for words in RUN[page]:
        arguments = [name for word in words for name in sorted(glob.glob(word)) or [word]]
        if words[0] == "stream" and "--frames" not in words:
            arguments += ["--frames", "8"]
        code = cli.main(arguments)
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

SHORT = "zsseg-rt train --config dogs.toml --set loop.iterations=3 --set loop.batch_size=2"


def blocks():
    text = (documents.ROOT / "docs" / "training.md").read_text(encoding="utf-8")
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
