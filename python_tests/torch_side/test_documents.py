"""README and docs say what is so: snippets run, commands parse, links lead somewhere."""

import re

import cv2
import pytest
import typer

pytest.importorskip("onnx")

from support import documents
from support.reader_folder import NAMES, add_bundles, add_photos, add_run
from tools.docs import settings
from zsseg_rt import Engine, cli
from zsseg_rt.demo import demo_photos
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
    cv2.imwrite(str(tmp_path / "street.jpg"), read_photo(demo_photos("scenes")[0])[..., ::-1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(name, folder):
    if name == "frame":
        return read_photo(folder / "street.jpg")
    if name == "dataset":
        from tools.scenes import SceneDataset

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
    if '"photos"' in code:
        (folder / "street.jpg").unlink()
        add_photos(folder)
    if "photos.toml" in code:
        add_run(folder)
    names = {name: given(name, folder) for block in blocks for name in block.given}
    for block in blocks:
        lines = "\n" * (block.line - 1) + block.code
        exec(compile(lines, block.page, "exec"), names)
    if isinstance(names.get("engine"), Engine):
        names["engine"].close()


def test_blocks_that_are_not_run_say_what_they_need():
    marked = [block for page in PAGES for block in documents.blocks_of(page) if block.not_run]
    assert marked
    for block in marked:
        assert block.language == "python", f"{block.page}:{block.line}: only Python is run"
        assert block.not_run.startswith("needs "), f"{block.page}:{block.line}"


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
        patch.setattr(cli, "app", lambda **given: parser(**given))
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
