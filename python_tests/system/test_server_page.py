"""The page in Chromium: the real server, photos and webcams of one's own, access by keyboard."""

import re

import cv2
import numpy as np
import pytest

from support.live_page import (
    ScriptedServer,
    accessibility_faults,
    canvas_pixels,
    class_colours,
    colours_of,
    expect,
    halves,
    open_page,
    overflow,
    set_slider,
    source,
)
from support.live_server import demo_server
from support.serve_process import serve_process
from zsseg_rt.demo import demo_photos

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


LONG = [
    "a very long class name that holds a whole sentence about what is to be found in the picture",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    ["dog", "puppy", "a small dog that runs"],
]
LONG_URI = (
    "rtsp://a-camera-in-the-long-corridor.example.org:554/stream/with/path?channel=1&subtype=0"
)
CONDITIONS = {
    "running": (LONG, [source(LONG_URI, "running"), source("cam2", "running")]),
    "lost": (["road"], [source("cam", "lost", f"{LONG_URI}: the camera closed the connection.")]),
    "crowded": ([f"thing {i}" for i in range(150)], [source("cam", "running")]),
    "absent": (["road", "sky"], []),
}


class TestAccess:
    @pytest.mark.parametrize(("size", "scheme"), [((1280, 800), "light"), ((390, 844), "dark")])
    def test_no_faults_in_any_condition(self, browser, size, scheme):
        with open_page(browser, size=size, color_scheme=scheme) as page:
            live = ScriptedServer(page).open()
            for names, sources in CONDITIONS.values():
                live.change(*(name if isinstance(name, str) else name[0] for name in names))
                live.say_state(*(sources or [source("cam", "running")]))
                live.send_frame(halves(0, 255))
                live.say_state(*sources)
                page.wait_for_timeout(300)  # a turn of the page's own clock
                assert accessibility_faults(page) == ""

    def test_no_faults_with_errors_a_token_and_no_server(self, browser):
        with open_page(browser) as page:
            live = ScriptedServer(page, token="x")
            page.goto(live.URL)
            page.get_by_role("form", name="This server asks for a token").wait_for()
            page.get_by_text("Synonyms and background").click()
            page.get_by_role("textbox", name="Look for").fill("")
            page.get_by_role("button", name="Apply").click()
            page.get_by_text("Name at least one class.").wait_for()
            assert accessibility_faults(page) == ""

    @pytest.mark.parametrize("width", [320, 390, 700])
    def test_nothing_has_to_be_scrolled_sideways(self, browser, width):
        with open_page(browser, size=(width, 844)) as page:
            live = ScriptedServer(page, LONG)
            live.sources = [source(LONG_URI, "lost", LONG_URI), source("cam2", "running")]
            live.open()
            live.send_frame(halves(0, 255))
            page.get_by_text("Synonyms and background").click()
            page.get_by_role("button", name="Freeze").click()
            live.change("new")
            page.get_by_text("There are new classes.").wait_for()
            assert overflow(page) <= 0

    def test_every_control_is_reached_by_tab_and_shows_it(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 1))
        page.mouse.click(2, 2)
        walked = []
        for _ in range(25):
            page.keyboard.press("Tab")
            walked.append(page.evaluate(WHERE))
            if walked[-1] is None:
                break
        names = [name for name, _ in filter(None, walked)]
        assert names == [
            *(
                "Skip to the class names",
                "Camera picture with its classes",
                "Freeze",
                "Save as PNG",
            ),
            *("Names", "Patterns", "Opacity", "Label a photo", "Use my webcam"),
            *("Look for", "Synonyms and background", "Apply"),
            *("Show all", "road", "Only road", "sky", "Only sky", "Unknown", "Only unknown"),
            "Unknown below",
        ]
        assert all(visible for _, visible in filter(None, walked))

    def test_moves_nothing_where_that_is_asked_for(self, browser):
        with open_page(browser, reduced_motion="reduce") as page:
            live = ScriptedServer(page).open()
            live.send_frame(halves(0, 1))
            moving = "getComputedStyle(document.querySelector('.bar i')).transitionDuration"
            assert page.evaluate(moving) == "0s"

    def test_says_little_while_frames_come(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 1))
        page.wait_for_timeout(1000)
        page.evaluate(COUNT_ANNOUNCEMENTS)
        for number in range(20):
            live.send_frame(halves(number % 2, 1))
        assert page.evaluate("announcements") <= 1


# Accessible name of the focused element, and whether its focus can be seen; null on the body.
WHERE = """() => {
  const at = document.activeElement;
  if (at === document.body) return null;
  const ring = (element) => getComputedStyle(element).outlineStyle !== "none";
  const name = at.ariaLabel ?? at.labels?.[0]?.querySelector(".name")?.textContent
    ?? at.labels?.[0]?.textContent ?? at.textContent;
  return [name.trim(), ring(at) || ring(at.closest("#stage") ?? at)];
}"""
COUNT_ANNOUNCEMENTS = """() => {
  window.announcements = 0;
  const observer = new MutationObserver(() => { announcements += 1; });
  for (const region of document.querySelectorAll("[aria-live], [role=status], [role=alert]")) {
    observer.observe(region, { childList: true, characterData: true, subtree: true });
  }
}"""


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
def own_server():
    with demo_server() as running:
        yield running


class TestOfThisComputer:
    def test_a_real_photo(self, browser, own_server):
        with open_page(browser) as page:
            page.goto(own_server.address)
            page.locator("#photo-file").set_input_files(demo_photos("scenes")[0])
            expect(page.locator("#own-help")).to_be_visible()
            expect(page.locator("#announcer")).to_contain_text("is labelled")
            assert canvas_pixels(page).shape[0] > 200
            page.locator("#photo-file").set_input_files(__file__)
            expect(page.locator("#complaint")).to_contain_text("cannot be read as a photo")
            expect(page.locator("#back")).to_be_visible()

    def test_the_webcam(self, browser, own_server):
        with open_page(browser) as page:
            page.add_init_script(_WEBCAM)
            page.goto(own_server.address)
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
    def test_a_webcam_that_is_refused(self, browser, own_server, kind, words):
        with open_page(browser) as page:
            page.add_init_script(
                "navigator.mediaDevices.getUserMedia = async () => "
                f"{{ throw new DOMException('why', '{kind}'); }}"
            )
            page.goto(own_server.address)
            page.get_by_role("button", name="Use my webcam").click()
            expect(page.locator("#complaint")).to_contain_text(words)
            expect(page.locator("#state")).to_have_text("Running")
