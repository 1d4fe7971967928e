"""Fixtures every test file shares."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference data beside the project; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("reference data not found: expected the folder 'shared' beside the project")
    return folder


@pytest.fixture(scope="session")
def colour_bundle(tmp_path_factory) -> Path:
    """A dense bundle whose text bank is colour words; see zsseg_rt.export.colour_words."""
    from zsseg_rt.export.colour_words import export_colour_bundle

    return export_colour_bundle(tmp_path_factory.mktemp("bundles") / "colours.zsseg")
