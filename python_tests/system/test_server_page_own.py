"""A photo or a webcam of the viewer's own on the page, in Chromium."""

import re

import numpy as np
import pytest

from support.live_page import (
    ScriptedServer,
    canvas_pixels,
    expect,
    halves,
    open_page,
)
from support.live_server import demo_server
from zsseg_rt.demo import demo_photos

LARGE = 33 * 1024 * 1024

_DROP = """([name, type, size, what]) => {
  const given = new DataTransfer();
  if (size) given.items.add(new File([new Uint8Array(size)], name, { type }));
  const Kind = what === "paste" ? ClipboardEvent : DragEvent;
  const key = what === "paste" ? "clipboardData" : "dataTransfer";
  const event = new Kind(what, { bubbles: true, cancelable: true, [key]: given });
  document.body.dispatchEvent(event);
}"""


# Browsers without a window have no camera; this one plays a canvas.
_WEBCAM = """
navigator.mediaDevices.getUserMedia = async () => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 320, height: 240 });
  const context = canvas.getContext("2d");
  setInterval(() => context.fillRect(0, 0, 9, Math.random() * 240), 50);
  context.fillRect(0, 0, 9, 9);
  window.webcam = canvas.captureStream(20);
  return window.webcam;
};
"""


def give(page, name="cat.jpg", kind="image/jpeg", size=10, what="drop"):
    page.evaluate(_DROP, [name, kind, size, what])


@pytest.fixture
def live(page):
    live = ScriptedServer(page).open()
    live.send_frame(halves(1, 1))
    return live


def is_split(page):
    """Whether the picture has the photo's labels, not the source's."""
    pixels = canvas_pixels(page)
    return not np.array_equal(pixels[4, 4], pixels[4, -4])


@pytest.mark.parametrize("way", ["drop", "paste", "choose"])
def test_a_photo_is_labelled_again_with_new_classes_until_one_goes_back(page, live, way):
    if way == "choose":
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Label a photo").click()
        chooser.value.set_files({"name": "cat.jpg", "mimeType": "image/jpeg", "buffer": b"0" * 10})
    else:
        give(page, what=way)
    expect(page.locator("#state")).to_have_text("cat.jpg")
    assert is_split(page)
    live.send_frame(halves(1, 1))  # the source goes on behind it
    assert is_split(page)
    live.change("house", "tree")
    live.wait_for(lambda: len(live.pictures) == 2)
    expect(page.locator("#classes .name bdi").first).to_have_text("house")
    page.get_by_role("button", name="Back to the source").click()
    expect(page.locator("#state")).to_have_text("Running")

    assert not is_split(page)
    assert live.pictures == [bytes(10) if way != "choose" else b"0" * 10] * 2


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ({"name": "notes.txt", "kind": "text/plain"}, 422, "notes.txt cannot be read as a photo."),
        ({"size": LARGE}, None, "cat.jpg has 33 MB. The server takes pictures of up to 32 MB"),
        ({}, 413, "cat.jpg has more pixels than the server takes."),
        ({}, 503, "The server is busy"),
        ({}, 500, "The server could not label cat.jpg."),
        ({"size": 0}, None, "That is no file."),
    ],
)
def test_what_cannot_be_labelled_is_told_and_changes_nothing(page, live, given, status, words):
    live.refuse_pictures_with = status
    give(page, **given)
    expect(page.locator("#complaint")).to_contain_text(words)
    expect(page.locator("#state")).to_have_text("Running")
    assert not is_split(page)
    assert len(live.pictures) == (status is not None)
    live.send_frame(halves(0, 0))
    expect(page.get_by_role("button", name="Back to the source")).to_be_hidden()


@pytest.fixture(scope="module")
def server():
    with demo_server() as running:
        yield running


class TestOfThisComputer:
    def test_a_real_photo(self, browser, server):
        with open_page(browser) as page:
            page.goto(server.address)
            page.locator("#photo-file").set_input_files(demo_photos("scenes")[0])
            expect(page.locator("#own-help")).to_be_visible()
            expect(page.locator("#announcer")).to_contain_text("is labelled")
            assert canvas_pixels(page).shape[0] > 200
            page.locator("#photo-file").set_input_files(__file__)
            expect(page.locator("#complaint")).to_contain_text("cannot be read as a photo")
            expect(page.locator("#back")).to_be_visible()

    def test_the_webcam(self, browser, server):
        with open_page(browser) as page:
            page.add_init_script(_WEBCAM)
            page.goto(server.address)
            page.get_by_role("button", name="Use my webcam").click()
            expect(page.locator("#state")).to_have_text("Your webcam")
            expect(page.locator("#rate")).to_have_text(re.compile(r"\d"))
            expect(page.locator("#picture")).to_have_js_property("width", 320)
            page.evaluate("webcam.getVideoTracks()[0].onended()")  # it was unplugged
            expect(page.locator("#complaint")).to_contain_text("unplugged")
            expect(page.locator("#state")).to_have_text("Running")
            page.get_by_role("button", name="Use my webcam").click()
            expect(page.locator("#state")).to_have_text("Your webcam")
            page.get_by_role("button", name="Use my webcam").click()
            expect(page.locator("#state")).to_have_text("Running")
            assert page.evaluate("webcam.getVideoTracks()[0].readyState") == "ended"  # let go

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("NotAllowedError", "did not let this page use the webcam"),
            ("NotFoundError", "finds no webcam"),
            ("NotReadableError", "Another program may be using it"),
            ("OtherError", "The webcam cannot be used: why"),
        ],
    )
    def test_a_webcam_that_is_refused(self, browser, server, kind, words):
        with open_page(browser) as page:
            page.add_init_script(
                "navigator.mediaDevices.getUserMedia = async () => "
                f"{{ throw new DOMException('why', '{kind}'); }}"
            )
            page.goto(server.address)
            page.get_by_role("button", name="Use my webcam").click()
            expect(page.locator("#complaint")).to_contain_text(words)
            expect(page.locator("#state")).to_have_text("Running")
