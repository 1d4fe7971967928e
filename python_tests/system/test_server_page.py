"""The page in Chromium with the real server: a demo stream, killed servers, a slow link."""

import json
import re
import time

import cv2
import numpy as np
import pytest

from support.live_page import (
    PATIENCE,
    accessibility_faults,
    canvas_pixels,
    class_colours,
    colours_of,
    expect,
    legend_names,
    open_page,
    overflow,
    set_slider,
)
from support.serve_process import serve_process
from support.throttle import SlowLink

CAMERA = "test://?demo=scenes&size=640x360&rate=15"
TOKEN = "a-token-for-tests-only"


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


def captured(page) -> int:
    """Frames that the source has given, as the page tells them."""
    return int(page.locator("#dropped").inner_text().split()[-1])


def age_ms(page) -> float | None:
    value, _, unit = page.locator("#age").inner_text().partition(" ")
    return float(value) * {"ms": 1, "s": 1000, "min": 60000}[unit] if unit else None


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


def test_hidden_classes_leave_the_picture(page):
    choose(page, "blue sky, yellow sand")
    expect(page.locator("#classes li")).to_have_count(3)
    page.get_by_label("Names", exact=True).uncheck()
    set_slider(page, "Opacity", 100)
    page.get_by_role("button", name="Freeze").click()
    before = canvas_pixels(page)
    assert colours_of(before) <= set(class_colours("blue sky", "yellow sand"))
    page.get_by_role("button", name="Only unknown").click()
    photo = canvas_pixels(page)
    assert len(colours_of(photo)) > 100
    set_slider(page, "Opacity", 0)
    np.testing.assert_array_equal(canvas_pixels(page), photo)
    page.get_by_role("button", name="Show all").click()
    set_slider(page, "Opacity", 100)
    np.testing.assert_array_equal(canvas_pixels(page), before)


def test_freeze_holds_the_picture_and_not_the_stream(page):
    page.get_by_role("button", name="Freeze").click()
    frozen, count = canvas_pixels(page), captured(page)
    page.wait_for_function(
        "(count) => document.querySelector('#dropped').textContent.split(' ').pop() > count",
        arg=count + 20,
    )
    np.testing.assert_array_equal(canvas_pixels(page), frozen)
    page.get_by_role("button", name="Freeze").click()
    for _ in range(PATIENCE // 100):
        if not np.array_equal(canvas_pixels(page), frozen):
            return
        page.wait_for_timeout(100)
    pytest.fail("the picture stayed")


def test_snapshot_is_what_is_seen(page, tmp_path):
    page.get_by_role("button", name="Freeze").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as PNG").click()
    assert re.fullmatch(r"zsseg-[\w.-]+\.png", download.value.suggested_filename)
    download.value.save_as(tmp_path / "snapshot.png")
    saved = cv2.imread(str(tmp_path / "snapshot.png"))[..., ::-1]
    np.testing.assert_array_equal(saved, canvas_pixels(page))


def test_errors_of_the_server_stand_beside_the_box(page):
    before = legend_names(page)
    choose(page, "blue sky, blue sky")
    expect(page.get_by_role("alert").filter(has_text="blue sky")).to_be_visible()
    assert legend_names(page) == before


def test_markup_is_a_word_like_others(page):
    name = "blue <img src=x onerror=document.title='owned'>"
    choose(page, name)
    expect(page.locator("#classes .name bdi")).to_have_text([name, "Unknown"])
    assert page.locator("img").count() == 0
    assert page.title() != "owned"


def test_the_unknown_threshold_takes_effect(page):
    choose(page, "blue sky, yellow sand")
    slider = page.get_by_role("slider", name="Unknown below")
    slider.fill("1")
    unknown = page.locator("#classes li").last.locator(".share")
    expect(unknown).to_have_text("100 %")
    slider.fill("0")
    expect(unknown).to_have_text("0 %")


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_no_access_faults_and_no_scrolling_sideways(browser, server, size):
    with open_page(browser, size=size) as page:
        page.goto(server.address)
        wait_for_picture(page)
        assert accessibility_faults(page) == ""
        assert overflow(page) <= 0


def test_a_slow_link_makes_no_growing_delay(browser, server):
    # Frames are some 30 kB, 15 a second. Sent as they come, they would lie in the link's buffer
    # and be 7 s old after 8 s.
    with (
        SlowLink(server.port, bytes_per_second=60_000, buffer_bytes=2_000_000) as link,
        open_page(browser) as page,
    ):
        page.goto(f"http://127.0.0.1:{link.port}/")
        wait_for_picture(page)
        until, ages = time.monotonic() + 8.0, []
        while time.monotonic() < until or len(ages) < 3:
            page.wait_for_timeout(500)
            if time.monotonic() > until - 2.0 and age_ms(page) is not None:
                ages.append(age_ms(page))
        assert min(ages) < 4000
        expect(page.locator("#rate")).to_contain_text("shown")  # fewer than were labelled


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


def test_a_server_with_a_token(browser, tmp_path):
    with serve(tmp_path, token=TOKEN) as server, open_page(browser) as page:
        page.goto(f"http://127.0.0.1:{server.port}/")
        expect(page.get_by_label("Token", exact=True)).to_be_focused()
        page.keyboard.type("another-token-of-that-length")
        page.keyboard.press("Enter")
        expect(page.get_by_text("The server does not know this token.")).to_be_visible()
        page.goto(f"http://127.0.0.1:{server.port}/#token={TOKEN}")
        page.reload()
        wait_for_picture(page)
        choose(page, "blue sky")
        expect(page.locator("#classes .name bdi")).to_have_text(["blue sky", "Unknown"])
        assert TOKEN not in json.dumps([page.url, page.content()])
