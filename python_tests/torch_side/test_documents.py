"""README and docs say what is so: snippets run, commands work in order, links lead somewhere."""

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import typer

pytest.importorskip("torch")

from support.reader_folder import NAMES, add_bundles, add_photos, add_run
from support.streams import numbered, write_video
from tools.docs import settings
from tools.scenes import SceneDataset, write_folder
from zsseg_rt import Bundle, Engine, cli
from zsseg_rt.photos import read_photo

ROOT = Path(__file__).parents[2]
# Everything that tells what is so now: not the list of changes.
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES += ("benchmarks/kernels.md", "cpp_tests/cuda_emulation/README.md")
PAGES = {
    page: page.read_text() for page in (*map(ROOT.joinpath, PAGES), *sorted(ROOT.glob("docs/*.md")))
}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (not run|given): (.+?) -->\n *\Z")


def blocks_of(text):
    """Line, language and code of each block, and its mark: what it needs, or names it is given."""
    for fence in FENCE.finditer(text):
        mark = MARK.search(text, 0, fence.start())
        code = re.sub(f"^{fence[1]}", "", fence[3], flags=re.MULTILINE)
        line = text.count("\n", 0, fence.start()) + 2
        yield line, fence[2], code, mark.groups() if mark else ("", "")


def lines_of(text):
    """Lines with calls of zsseg-rt in shell, in units of systemd, and inline, with their words.

    Square brackets stand around what may be left out, which is kept; N, M, S and T for numbers.
    "..." leaves words out: such a call is not among them.
    """
    lines = [line for _, _, code, _ in blocks_of(text)
             for line in code.replace("\\\n", " ").splitlines()]  # fmt: skip
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    for line in lines:
        if re.search(r"(?<![\w.-])zsseg-rt +\S", line):
            lexer = shlex.shlex(line.removeprefix("ExecStart="), posix=True, punctuation_chars=True)
            lexer.whitespace_split, calls = True, []
            for _, words in groupby(lexer, lambda word: set(word) <= set("&|;<>()")):
                call = [word.strip("[]").rpartition("/bin/")[2] for word in words]
                if "zsseg-rt" in call and "..." not in call:
                    call = call[call.index("zsseg-rt") + 1 :]
                    calls.append(["1" if word in set("NMST") else word for word in call])
            yield line, calls


def links_of(text):
    return [x for x in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)) if "://" not in x]


def anchors_of(text):
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def programs_of(page):
    return [(line, code, words.split(", ") if kind == "given" else [])
            for line, language, code, (kind, words) in blocks_of(PAGES[page])
            if language == "python" and kind != "not run"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache of the documents' own, so that phrases are embedded once."""
    return str(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("page", [*filter(programs_of, PAGES)], ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch, home):
    monkeypatch.setenv("ZSSEG_HOME", home)
    monkeypatch.chdir(tmp_path)
    add_photos(tmp_path)
    blocks, names = programs_of(page), {}
    code, given = "\n".join(block[1] for block in blocks), [n for block in blocks for n in block[2]]
    if "engine" in given or ".zsseg" in code or '"sfp-b16"' in code:
        add_bundles(tmp_path)
    if "photos.toml" in code:
        add_run(tmp_path)
    for name in given:
        assert name in ("frame", "dataset", "engine"), f"{name}: add what it stands for"
    if "frame" in given:
        names["frame"] = read_photo(tmp_path / "street.jpg")
    if "dataset" in given:
        names["dataset"] = SceneDataset("train", length=16)
    if "engine" in given:
        names["engine"] = Engine(tmp_path / "street.zsseg")
        names["engine"].set_classes(NAMES[:2])
    for line, code, _ in blocks:
        exec(compile("\n" * (line - 1) + code, page, "exec"), names)
    if isinstance(names.get("engine"), Engine):
        names["engine"].close()


def without_work(command):
    """The command line, all of which only parses."""
    for inner in getattr(command, "commands", {}).values():
        without_work(inner)
    if not getattr(command, "commands", None):
        command.callback = lambda **settings: 0
    return command


def test_commands_parse(monkeypatch, capsys):
    parser = without_work(typer.main.get_command(cli.app))
    monkeypatch.setattr(cli, "app", lambda **options: parser(**options))
    for page, text in PAGES.items():
        for line, calls in lines_of(text):
            assert calls or "..." in line, f"{page.name}: {line}"
            for words in calls:
                assert cli.main(words) == 0, f"{page.name}: {line}: {capsys.readouterr().err}"
    for words in (["segment", "--absent", "x"], ["absent"], ["train", "--seed"]):
        assert cli.main(words) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_scripts_links_and_lines_of_a_page(page):
    for line, language, _, (kind, words) in blocks_of(PAGES[page]):
        assert kind != "not run" or (language == "python" and words.startswith("needs ")), line
    scripts = r"\b(?:tools|benchmarks|docs/examples)/[\w/]+\.(?:sh|py)\b"
    for script in re.findall(scripts, PAGES[page]):
        assert (ROOT / script).is_file(), script
    for link in links_of(PAGES[page]):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text()), link
    assert [line for line in PAGES[page].splitlines() if len(line) > 140] == []


def test_the_lists_of_settings_are_current_and_readme_links_every_page():
    page = settings.PAGE.read_text(encoding="utf-8")
    assert settings.with_lists(page) == page, "run python -m tools.docs.settings"
    linked = {link.partition("#")[0] for link in links_of(PAGES[ROOT / "README.md"])}
    assert {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"} <= linked


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
    for page, text in PAGES.items():
        for words in (words for _, calls in lines_of(text) for words in calls):
            needs = any(re.search(pattern, " ".join(words)) for pattern in NOT_RUN)
            if not needs and words not in run:
                by_page.setdefault(page, []).append(words)
                is_free = {"--demo", "demo", "doctor", "fetch", "--recipes"} & set(words)
                run += [words] if is_free else []
    return by_page


RUN = runnable()
KINDS = {"doctor", "segment", "stream", "train", "export", "evaluate", "info"}
assert {words[0] for calls in RUN.values() for words in calls} >= KINDS


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


# --- the example that docs/training.md begins with, trained for three steps ---

SHORT = "zsseg-rt train --config dogs.toml --set loop.iterations=3 --set loop.batch_size=2"


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_the_example_runs_from_photos_to_labels(whole, tmp_path):
    """Up to the check of the photos and masks, nightly to the end."""
    for folder in ("zsseg_rt", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    text = PAGES[ROOT / "docs" / "training.md"]
    section = re.search(r"^## An example.*?(?=^## )", text, re.MULTILINE | re.DOTALL)[0]
    (settings,) = (code for _, language, code, _ in blocks_of(section) if language == "toml")
    (tmp_path / "dogs.toml").write_text(settings)
    commands = "".join(code for _, language, code, _ in blocks_of(section) if language == "bash")
    assert commands.count("--config dogs.toml\n") == 1
    commands = commands.replace("zsseg-rt train --config dogs.toml\n", f"{SHORT}\n")
    commands = commands.replace(" clip\n", " clip\nls clip/* | tail -n +9 | xargs rm\n", 1)
    if not whole:
        commands = commands.partition("--check-data")[0] + "--check-data"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    place = {"PATH": path, "PYTHONPATH": str(ROOT), "ZSSEG_HOME": str(tmp_path / "home")}
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
