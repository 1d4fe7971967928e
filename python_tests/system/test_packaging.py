"""The source distribution holds what a build needs, a build of it what an installation needs."""

import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from support.command_line import python

ROOT = Path(__file__).parents[2]
IN_SDIST = (
    "csrc", "cpp_tests", "zsseg_rt", "tools", "CMakeLists.txt", "setup.py", "pyproject.toml",
    "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
)  # fmt: skip
READ_AT_RUN_TIME = (
    "demo/scenes.zsseg/image_encoder.float32.onnx",
    "evaluation/datasets/tables/voc2012.json",
    "export/clip_words/merges.txt.gz",
    "models/clip/demo.safetensors",
    "profiling/page.html",
    "server/page.html",
    "training/recipes/zegclip_voc_inductive.toml",
)


def tracked(*paths):
    """Files of the project that git knows and that are there."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("which files belong to the project is only known in a git checkout")
    call = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *paths]
    listed = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def setup_py(folder, *arguments):
    done = python("setup.py", "-q", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A source distribution made of what git knows, and of rubbish beside it, unpacked."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    for rubbish in ("zsseg_rt/_C.so", "zsseg_rt/__pycache__/x.pyc", "tools/__pycache__/x.pyc"):
        (checkout / rubbish).parent.mkdir(exist_ok=True)
        (checkout / rubbish).write_bytes(b"rubbish")
    setup_py(checkout, "sdist", "--formats=gztar")
    (archive,) = (checkout / "dist").iterdir()
    target = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(archive, target)
    (folder,) = target.iterdir()
    return folder


def test_sdist_holds_what_a_build_needs(unpacked):
    files = files_in(unpacked)
    assert tracked(*IN_SDIST) - files == set()
    egg_info = {name for name in files if name.startswith("zsseg_rt.egg-info/")}
    assert files - tracked() - egg_info == {"PKG-INFO", "setup.cfg"}  # and no rubbish


def test_every_file_that_cmake_reads_is_in_the_sdist(unpacked, tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not on the PATH")
    call = [cmake, "-S", unpacked, "-B", tmp_path, "-DZSSEG_CUDA=OFF", "-DZSSEG_BUILD_PYTHON=OFF"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_installation_from_the_sdist_has_its_data(unpacked, tmp_path):
    setup_py(unpacked, "build_py", "--build-lib", tmp_path)
    assert tracked("zsseg_rt") - files_in(tmp_path) == set()
    for name in READ_AT_RUN_TIME:
        assert (tmp_path / "zsseg_rt" / name).stat().st_size > 0


@pytest.mark.nightly
def test_an_installation_from_the_sdist_labels_the_demo(unpacked, tmp_path):
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are not on the PATH")
    source = shutil.copytree(unpacked, tmp_path / "source")  # the build writes into it
    own = {"ZSSEG_CUDA": "OFF", "ZSSEG_HOME": str(tmp_path / "home"), "PYTHONPATH": "",
           "CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0", "ZSSEG_EXTENSION": ""}  # fmt: skip
    install = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
               "--disable-pip-version-check", "--target", tmp_path / "site", source)  # fmt: skip
    done = python(*install, more_env=own, timeout=3600)
    assert done.returncode == 0, done.stderr
    own["PYTHONPATH"] = str(tmp_path / "site")
    call = ("-m", "zsseg_rt", "segment", "--demo", "--out", tmp_path / "out")
    done = python(*call, more_env=own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").glob("*.overlay.png"))


def test_the_first_run_s_packages_are_installed():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.partition("\ndependencies = [\n")[2].partition("\n]")[0]
    requirements = [Requirement(line.strip(' ",')) for line in table.splitlines()]
    for machine in ("x86_64", "aarch64"):
        where = {"platform_machine": machine}
        needed = {one.name for one in requirements if not one.marker or one.marker.evaluate(where)}
        assert {"numpy", "openvino", "opencv-python-headless", "tokenizers", "typer"} <= needed
