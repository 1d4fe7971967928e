"""The extension is compiled once per state of its source: setup.py with a stand-in for CMake."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a build leaves depends on the source, and each build is counted.
CMAKE = """#!/bin/sh
case "$1" in
  --version) echo "cmake version 3.30" ;;
  --build) sleep ${SLOW:-0}; echo built >>"$COUNT"; cat "$SOURCE" >"$2/_C$SUFFIX" ;;
esac
"""


SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


class Checkout:
    """A folder with setup.py and a source that a stand-in compiles."""

    def __init__(self, folder):
        self.folder, self.built, self.counted = folder, folder / "built", folder / "count"
        self.source, self.tools = folder / "csrc" / "deep" / "kernel.cpp", folder / "tools"
        for made in (self.source.parent, folder / "zsseg_rt", self.tools):
            made.mkdir(parents=True)
        self.source.write_text("int one;")
        shutil.copy(ROOT / "setup.py", folder)
        (folder / "CMakeLists.txt").write_text("project(x)")
        self.write_tool("cmake", CMAKE)
        kept = {name: os.environ[name] for name in ("PYTHONPATH", "HOME") if name in os.environ}
        self.environment = {
            **kept, "PATH": f"{self.tools}:/usr/bin:/bin", "ZSSEG_HOME": str(folder / "home"),
            "COUNT": str(self.counted), "SOURCE": str(self.source), "SUFFIX": SUFFIX,
        }  # fmt: skip

    def write_tool(self, name, text):
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def start(self, **environment):
        call = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(self.built)]
        environment = {**self.environment, **environment}
        return subprocess.Popen(call, cwd=self.folder, env=environment, stderr=subprocess.PIPE)

    def build(self, **environment):
        """How many times something was compiled."""
        before = self.count()
        child = self.start(**environment)
        assert child.wait(60) == 0, child.stderr.read()
        return self.count() - before

    def count(self):
        return self.counted.read_text().count("built") if self.counted.exists() else 0

    def extension(self):
        return (self.built / "zsseg_rt" / f"_C{SUFFIX}").read_text()

    def entries(self):
        return sorted((self.folder / "home" / "extensions").iterdir())


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "checkout")


def test_what_changed_is_compiled_and_nothing_else(checkout):
    assert checkout.build() == 1
    shutil.rmtree(checkout.built)
    shutil.rmtree(checkout.folder / "build")
    assert checkout.build(LANG="C.UTF-8", CMAKE_CXX_COMPILER_LAUNCHER="ccache") == 0
    assert checkout.extension() == "int one;"
    checkout.source.write_text("int two;")
    assert checkout.build() == 1
    assert checkout.extension() == "int two;"
    checkout.source.write_text("int one;")
    assert checkout.build(ZSSEG_CUDA="OFF") == 1
    assert checkout.build(CXXFLAGS="-O0") == 1
    checkout.write_tool("c++", "#!/bin/sh\necho 'another compiler 99'\n")
    assert checkout.build() == 1
    assert checkout.build() == 0
    assert len(checkout.entries()) == 5


@pytest.mark.parametrize("damage", [b"", b"int onE;"])
def test_a_damaged_entry_is_never_used(checkout, damage):
    assert checkout.build() == 1
    (entry,) = checkout.entries()
    entry.write_bytes(damage)
    assert checkout.build() == 1
    assert checkout.extension() == "int one;"
    assert checkout.entries() == [entry]
    assert entry.read_text() == "int one;"


def test_a_folder_that_others_may_write_to_is_not_used(checkout):
    assert checkout.build() == 1
    (checkout.folder / "home" / "extensions").chmod(0o777)
    assert checkout.build() == 1
    assert checkout.build(ZSSEG_HOME=str(checkout.source)) == 1  # a file: no folder can be there
    assert checkout.build(ZSSEG_BUILD_CACHE="0") == 1


def test_two_builds_at_once_compile_once(checkout):
    children = [checkout.start(SLOW="1") for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert checkout.count() == 1
    assert checkout.extension() == "int one;"


def test_a_build_without_isolation_names_what_is_missing(tmp_path):
    """Rather than a traceback of an import, or of a program that was not found."""
    call = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        call, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "expected cmake to be installed, got nothing" in done.stderr.splitlines()[-1]


def test_pyproject_is_in_the_form_that_setuptools_61_reads():
    """Ubuntu 24.04 has 68.1; texts for the licence and ``license-files`` came with 77."""
    text = (ROOT / "pyproject.toml").read_text()
    project = text.partition("[project]")[2].partition("[project.optional")[0]
    assert 'license = { text = "' in project
    assert "license-files" not in text
    assert '"setuptools>=61"' in text.partition("[project]")[0]
