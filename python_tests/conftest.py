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


@pytest.fixture(scope="session")
def zegclip_model():
    """A tiny random ZegCLIP whose text tower knows the whole CLIP vocabulary."""
    import tiny

    return tiny.zegclip_model(tiny.TinySizes(text_vocab=49408, text_length=77))


@pytest.fixture(scope="session")
def zegclip_bundle(zegclip_model, tmp_path_factory) -> Path:
    """That model as a bundle; its classes are "name 0" to "name 6"."""
    from zsseg_rt.export import export_bundle

    return export_bundle(
        zegclip_model,
        tmp_path_factory.mktemp("bundles") / "tiny.zsseg",
        class_names=[f"name {index}" for index in range(7)],
    )
