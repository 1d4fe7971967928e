"""The page in Chromium with the real server: a demo stream, killed servers, a slow link."""

import re

import cv2
import numpy as np
import pytest

from support.live_page import (
    canvas_pixels,
    class_colours,
    colours_of,
    expect,
    open_page,
    set_slider,
)
from support.serve_process import serve_process

CAMERA = "test://?demo=scenes&size=640x360&rate=15"


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("serve")) as running:
        yield running


def serve(folder, *arguments, token=""):
    """A server whose labels do not follow: places that come in would be unknown."""
    environment = {"ZSSEG_TOKEN": token}
    return serve_process(folder, "--no-follow", *arguments, env=environment, source=CAMERA)


@pytest.fixture
def page(browser, server):
    with open_page(browser) as opened:
        opened.goto(server.address)
        wait_for_picture(opened)
        yield opened


def wait_for_picture(page) -> None:
    page.locator("#stage:not(.empty)").wait_for()


def choose(page, words: str) -> None:
    box = page.get_by_role("textbox", name="Look for")
    box.fill(words)
    box.press("Control+Enter")


def test_new_words_change_legend_and_pixels(page):
    page.get_by_label("Names", exact=True).uncheck()
    set_slider(page, "Opacity", 100)
    choose(page, "blue sky, yellow sand")
    names = page.locator("#classes .name bdi")
    expect(names).to_have_text(["blue sky", "yellow sand", "Unknown"])
    two = colours_of(canvas_pixels(page))
    assert two
    assert two <= set(class_colours("blue sky", "yellow sand"))
    expect(page.locator("#announcer")).to_contain_text("2 new classes in use")

    choose(page, "purple striped cone\nred metal ball\ngreen grass\ngrey sky")
    expect(names).to_have_count(5)
    expect(names.filter(has_text="grey sky")).to_have_count(1)  # what is seen comes first
    page.get_by_role("button", name="Freeze").click()
    four = class_colours("purple striped cone", "red metal ball", "green grass", "grey sky")
    assert colours_of(canvas_pixels(page)) <= set(four)
    shares = page.locator("#classes .share").all_inner_texts()
    assert 97 <= sum(int(share.strip("<% ")) for share in shares) <= 106  # each is rounded


def test_snapshot_is_what_is_seen(page, tmp_path):
    page.get_by_role("button", name="Freeze").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as PNG").click()
    assert re.fullmatch(r"zsseg-[\w.-]+\.png", download.value.suggested_filename)
    download.value.save_as(tmp_path / "snapshot.png")
    saved = cv2.imread(str(tmp_path / "snapshot.png"))[..., ::-1]
    np.testing.assert_array_equal(saved, canvas_pixels(page))


def test_a_killed_server_is_told_and_found_again(browser, tmp_path):
    with open_page(browser) as page:
        with serve(tmp_path) as server:
            page.goto(server.address)
            wait_for_picture(page)
            choose(page, "blue sky")
            expect(page.locator("#classes .name bdi")).to_have_text(["blue sky", "Unknown"])
        expect(page.locator("#notice")).to_contain_text("No connection to the server. Trying again")
        expect(page.locator("#announcer")).to_contain_text("No connection to the server")
        with serve(tmp_path, "--port", str(server.port)):
            expect(page.locator("#notice")).to_be_hidden()
            expect(page.locator("#classes li")).to_have_count(29)  # the demo's own classes again
