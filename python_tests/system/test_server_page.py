"""The page in Chromium: what it draws, asks for and says, with a scripted and a real server."""

import re
import shutil
import time

import cv2
import numpy as np
import pytest

from support.live_page import (
    ScriptedServer,
    canvas_pixels,
    class_colours,
    expect,
    halves,
    open_page,
    source,
)
from support.live_server import demo_server
from support.required import without_streams
from zsseg_rt.demo import demo_photos

ROAD, SKY, TREE = class_colours("road", "sky", "tree")
GREY = (128, 128, 128)  # the scripted server's picture


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    try:
        import axe_playwright_python  # noqa: F401
        from playwright.sync_api import sync_playwright
    except ImportError as exc:
        without_streams(f"the page's tests need playwright, axe-playwright-python, serve: {exc}")
    program = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if program is None:
        without_streams("the page's tests need: apt install chromium-headless-shell")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])


@pytest.fixture
def page(browser):
    with open_page(browser) as opened:
        yield opened


@pytest.fixture
def live(page):
    """A server of classes road and sky, which has sent one frame of both."""
    live = ScriptedServer(page).open()
    live.send_frame(halves(0, 1))
    return live


def has_names(page, *names) -> None:
    expect(page.locator("#classes .name bdi")).to_have_text([*names, "Unknown"])


def bare(page) -> None:
    """Show the labels' own colours: no names, full opacity."""
    page.get_by_label("Names", exact=True).uncheck()
    page.get_by_role("slider", name="Opacity").fill("100")


def colours(page) -> set:
    return {tuple(colour) for colour in canvas_pixels(page).reshape(-1, 3).tolist()}


def apply(page, words: str):
    box = page.get_by_role("textbox", name="Look for")
    box.fill(words)
    box.press("Control+Enter")
    return box


def test_each_pixel_has_the_colour_of_its_label(page, live):
    assert not page.evaluate("isSecureContext")  # as in a local network
    labels = halves(0, 1)
    labels[3, 5] = 255
    live.send_frame(labels)
    bare(page)
    table = np.array([ROAD, SKY], np.uint8)
    expected = np.where(labels[..., None] == 255, GREY, table[np.minimum(labels, 1)])
    doubled = expected.repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(canvas_pixels(page), doubled)
    live.send_frame(halves(0, 0))
    for opacity in (0, 50, 100):
        page.get_by_role("slider", name="Opacity").fill(str(opacity))
        expected = np.array(GREY) + opacity / 100 * (np.array(ROAD) - GREY)
        assert np.abs(canvas_pixels(page).astype(int) - expected).max() <= 1  # 8-bit alpha
    live.send_frame(halves(0, 0), label_width=7)
    expect(page.get_by_text("A picture could not be read")).to_be_visible()
    live.send_frame(halves(1, 1))
    assert colours(page) == {SKY}
    page.get_by_label("Patterns").check()
    assert len(colours(page)) == 2  # strong and weak, in the same colour


def test_labels_that_were_moved_are_told_from_computed_ones(page, live):
    rate, age = page.locator("#rate"), page.locator("#age")
    live.say_state(source("camera", "running"))
    live.send_frame(halves(0, 1))
    expect(rate).not_to_contain_text("labelled")
    expect(age).not_to_contain_text("labels")
    camera = source("camera", "running", captured=90, labelled=8, given_out=80)
    live.say_state(camera, rate=4.0, given_out_rate=30.0)
    captured = 1000.0 * (time.monotonic() - 0.8)
    live.send_frame(halves(0, 1), moved_from=3, labelled_ms=captured)
    expect(rate).to_contain_text("30, 4.0 labelled")
    expect(age).to_contain_text("labels")
    line = page.locator("#source-list")
    expect(line).to_contain_text("8 labelled, 80 given out with labels")
    expect(line).to_contain_text("Labels are of frames 240 ms ago (median)")


def test_labels_of_many_classes_have_two_bytes_and_classes_may_come_after_their_frame(page):
    names = [f"thing {i}" for i in range(300)]
    live = ScriptedServer(page, names).open()
    live.send_frame(halves(299, 65535, dtype=np.uint16))
    bare(page)
    assert colours(page) == {class_colours(*names)[299], GREY}
    page.get_by_label("In the picture only").check()
    expect(page.locator("#classes li:visible bdi")).to_have_text(["thing 299", "Unknown"])
    live.version, live.names = 2, [["tree"], ["house"]]
    live.send_frame(halves(0, 1))
    assert colours(page) == {GREY}
    live.say("vocabulary", **live.vocabulary())
    has_names(page, "tree", "house")
    assert colours(page) == set(class_colours("tree", "house"))


def test_freeze_keeps_the_picture_and_lets_the_stream_go_on(page, live):
    live.send_frame(halves(0, 0))
    bare(page)
    page.get_by_role("button", name="Freeze").click()
    for _ in range(3):
        live.send_frame(halves(1, 1))  # waits until it was acknowledged
    assert colours(page) == {ROAD}
    live.change("cat", "dog")
    expect(page.get_by_text("You see them when you end the freeze")).to_be_visible()
    has_names(page, "road", "sky")
    page.get_by_role("button", name="Freeze").click()
    live.send_frame(halves(1, 1))
    assert colours(page) == {class_colours("cat", "dog")[1]}
    has_names(page, "dog", "cat")


def test_classes_in_the_picture_come_first_and_are_hidden_and_shown(page):
    live = ScriptedServer(page, ["road", "sky", "tree"]).open()
    labels = halves(1, 2)
    labels[:6] = 255
    live.send_frame(labels)
    expect(page.locator("#classes .share")).to_have_text(["38 %", "38 %", "0 %", "25 %"])
    has_names(page, "sky", "tree", "road")
    bare(page)
    box = page.get_by_role("checkbox", name="sky")
    box.uncheck()
    assert colours(page) == {GREY, TREE}
    box.check()
    assert colours(page) == {GREY, SKY, TREE}
    page.get_by_role("button", name="Only tree").click()
    assert colours(page) == {GREY, TREE}
    assert not box.is_checked()
    page.get_by_role("button", name="Only unknown").click()
    assert not colours(page) & {SKY, TREE}
    assert len(colours(page)) == 3  # the picture where classes are; two greys
    page.get_by_role("button", name="Show all").click()
    assert colours(page) >= {SKY, TREE}
    box.focus()
    live.send_frame(halves(0, 0))
    page.wait_for_timeout(600)
    has_names(page, "sky", "tree", "road")  # not under somebody's hand
    page.get_by_role("button", name="Freeze").focus()
    has_names(page, "road", "sky", "tree")


def test_markup_in_a_name_stays_text(page):
    name = "<img src=x onerror=document.title='owned'>"
    live = ScriptedServer(page, [name, ["sky", "<b>blue</b>"]]).open()
    live.send_frame(halves(0, 1))
    expect(page.locator("#classes .name").first).to_have_text(name)
    expect(page.locator("#classes small")).to_have_text("or <b>blue</b>")
    live.say_state(source(name, "lost", name), source("<i>", "running"))
    expect(page.locator("#source-list .error:visible")).to_have_text(name)
    assert page.locator("img, b, i:not(.bar i)").count() == 0
    assert page.title() != "owned"


def test_the_pointer_and_arrow_keys_tell_the_class(page, live):
    box = page.locator("#picture").bounding_box()
    for part, words in ((0.25, "Here: road"), (0.75, "Here: sky")):
        page.mouse.move(box["x"] + part * box["width"], box["y"] + 0.5 * box["height"])
        expect(page.get_by_text(words)).to_be_visible()
    page.mouse.move(2, 2)
    expect(page.get_by_text("Here:")).to_have_count(0)
    page.get_by_role("application", name="Camera picture").focus()
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Shift+ArrowLeft")
    expect(page.locator("#crosshair")).to_be_visible()
    announcer = page.locator("#announcer")
    expect(announcer).to_contain_text("road, 40 % from the left, 50 % from the top")
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    expect(announcer).to_have_text(re.compile("sky, 70 % from the left"))
    page.keyboard.press("Enter")
    expect(announcer).to_contain_text("road 50 %, sky 50 %")
    page.keyboard.press("Escape")
    expect(page.locator("#crosshair")).to_be_hidden()


def test_the_form_reads_lines_and_commas(page, live):
    page.get_by_text("Synonyms and background").click()
    page.get_by_label("Background").fill("wall, floor")
    for text, comma, classes in (
        ("cat\n dog \n\n# not this\nbird", "classes", ["cat", "dog", "bird"]),
        ("cat, dog,, bird", "classes", ["cat", "dog", "bird"]),
        ("dog, puppy\ncat", "synonyms", [["dog", "puppy"], "cat"]),
    ):
        page.get_by_role("radio", name=comma).check()
        apply(page, text)
        live.wait_for(lambda: live.bodies)
        asked = {"classes": classes, "background": ["wall", "floor"]}
        assert live.bodies == [("v1/vocabulary", asked)]
        live.bodies.clear()
        live.send_frame(halves(0, 1))
        has_names(page, *(group if isinstance(group, str) else group[0] for group in classes))


def test_the_background_is_chosen_until_somebody_writes_one_and_remarks_are_shown(page):
    remarks = ["class_names: 'tree': this model sees no trees.", "class_names: 'a'."]
    facts = {"background": ["background", "sheep"], "auto_background": True, "remarks": remarks}
    live = ScriptedServer(page, **facts).open()
    note = page.locator("#words-remarks")
    expect(note).to_have_text("'tree': this model sees no trees.\n'a'.")
    expect(note).to_have_role("status")
    live.remarks = []
    page.get_by_text("Synonyms and background").click()
    box = page.get_by_label("Background")
    expect(box).to_have_value("auto")
    expect(page.locator("#background-help")).to_contain_text("Now: background, sheep.")
    for text, asked in ((None, "auto"), (" none ", "none"), ("wall,", ["wall"])):
        if text is not None:
            box.fill(text)
        live.bodies.clear()
        apply(page, "sheep")
        live.wait_for(lambda: live.bodies)
        assert live.bodies == [("v1/vocabulary", {"classes": ["sheep"], "background": asked})]
        expect(note).to_be_hidden()


def test_errors_are_shown_beside_the_box(page, live):
    apply(page, " ,\n")
    expect(page.get_by_text("Name at least one class.")).to_be_visible()
    assert live.bodies == []  # the server is not asked
    live.refuse_with = 422, "class_names[1]: expected a new name, got 'cat' twice"
    box = apply(page, "cat\ncat")
    error = page.get_by_role("alert").filter(has_text="got 'cat' twice")
    expect(error).to_be_visible()
    expect(box).to_have_attribute("aria-invalid", "true")
    expect(box).to_be_focused()
    expect(box).to_have_value("cat\ncat")
    live.refuse_with, live.unknown = (422, "class_names: expected ..."), ["zebra", "quark"]
    apply(page, "zebra\nsky\nquark")
    words_error = page.locator("#words-error")
    expect(words_error).to_contain_text("does not know “zebra”, “quark”.")
    expect(words_error).not_to_contain_text("class_names")
    live.refuse_with = None
    apply(page, "cat")
    expect(error).to_have_count(0)


def test_known_names_and_words_are_suggested(page):
    names = ["cat", "caterpillar", "tea cat", "car", "dog", "red metal ball"]
    words = ["ball", "box", "metal", "red"]
    ScriptedServer(page, known_names=names, known_words=words).open()
    box, suggestions = page.get_by_role("textbox", name="Look for"), page.locator("#suggestions")
    for typed, offered, name, text in (
        ("dog, Cat", ["caterpillar", "tea cat"], "caterpillar", "dog, caterpillar"),
        ("dog, ca", ["cat", "caterpillar", "car", "tea cat"], "tea cat", "dog, tea cat"),
        ("re", ["red metal ball", "red"], "red metal ball", "red metal ball"),
        ("red b", ["red ball", "red box"], "red box", "red box"),
    ):
        box.fill("")
        expect(suggestions).to_be_hidden()
        box.press_sequentially(typed)
        expect(suggestions.get_by_role("button")).to_have_text(offered)
        suggestions.get_by_role("button", name=name, exact=True).click()
        expect(box).to_have_value(text)
        expect(suggestions).to_be_hidden()
        expect(box).to_be_focused()


def test_what_others_choose_is_told_and_leaves_what_is_being_typed(page, live):
    box = page.get_by_role("textbox", name="Look for")
    box.fill("cat")
    live.change("house", "tree")
    expect(page.get_by_text("New classes are set.")).to_be_visible()
    live.send_frame(halves(0, 1))
    expect(page.get_by_text("New classes are set.")).to_be_hidden()
    expect(page.locator("#announcer")).to_have_text(re.compile("2 new classes in use"))
    has_names(page, "house", "tree")
    expect(box).to_have_value("cat")
    page.get_by_role("button", name="Undo").click()
    expect(box).to_have_value("house\ntree")
    live.change("boat")
    expect(box).to_have_value("boat")


def test_the_unknown_threshold_is_sent_once_it_rests(page, live):
    slider = page.get_by_role("slider", name="Unknown below")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    live.wait_for(lambda: live.unknown_below == 0.05)
    assert {path for path, _ in live.bodies} == {"v1/settings"}
    live.refuse_with = 422, "unknown_below: expected a score that this bundle has"
    slider.fill("0.5")
    expect(page.get_by_text("expected a score that this bundle has")).to_be_visible()
    live.say("vocabulary", **live.vocabulary())
    expect(slider).to_have_value("0.05")


def test_a_source_that_does_not_run_is_told_in_words(page, live):
    for state, words in {
        "starting": "Opening the camera",
        "stalled": "The camera sends nothing",
        "lost": "Camera lost, trying again",
        "ended": "The source has ended. This is its last picture",
    }.items():
        live.say_state(source("rtsp://cam/1", state, "Check its power."))
        expect(page.locator("#notice")).to_have_text(f"{words}. Check its power.")
        live.say_state(source("rtsp://cam/1", "running"))
        expect(page.locator("#notice")).to_be_hidden()
        expect(page.locator("#status")).to_contain_text("Running")


def test_ages_are_of_the_servers_clock_and_of_live_sources(page):
    live = ScriptedServer(page).open()
    live.wait_for(lambda: live.taken("ping"))
    shown = page.locator("#age")
    live.send_frame(halves(0, 1), age_ms=90_000)
    live.wait_for(lambda: re.fullmatch(r"\d+ s", shown.inner_text()))
    assert 89 <= int(shown.inner_text().split()[0]) <= 119
    live.say_state(source("video.mp4", "running") | {"live": False})
    expect(page.locator("#age-box")).to_be_hidden()
    expect(page.locator("#source-list")).not_to_contain_text("From capture to labels")
    live.say_state(source("cam", "running") | {"live": True})
    expect(page.locator("#age-box")).to_be_visible()


def test_of_several_sources_one_is_watched(page):
    sources = [source("cam/1", "running"), source("cam/2", "lost")]
    live = ScriptedServer(page, sources=sources).open()
    live.wait_for(lambda: live.taken("watch"))
    live.send_frame(halves(0, 1), source="cam/1")
    freeze = page.get_by_role("button", name="Freeze")
    expect(freeze).to_be_enabled()
    choice = page.get_by_label("Source", exact=True)
    choice.select_option("cam/2")
    expect(page.locator("#notice")).to_contain_text("Camera lost, trying again")
    expect(freeze).to_be_disabled()  # another camera's picture does not stay
    live.send_frame(halves(0, 1), source="cam/1")  # it was under way
    expect(freeze).to_be_disabled()
    expect(page.locator("#classes .share").first).to_have_text("\u2013")
    live.send_frame(halves(0, 1), source="cam/2")
    expect(freeze).to_be_enabled()
    choice.select_option("All in turns")
    expect(page.locator("#status")).to_contain_text("1 of 2 sources running")
    live.wait_for(lambda: len(live.taken("watch")) == 3)
    assert [message["source"] for message in live.taken("watch")] == ["cam/1", "cam/2", None]


def test_a_hidden_page_asks_for_nothing_until_it_is_seen(page, live):
    page.evaluate("Object.defineProperty(document, 'hidden', { value: true, writable: true })")
    live.socket.send(live.frame(halves(1, 1)))
    page.wait_for_timeout(1000)
    assert len(live.taken("ack")) == 1
    page.evaluate("document.hidden = false; document.dispatchEvent(new Event('visibilitychange'))")
    live.wait_for(lambda: len(live.taken("ack")) == 2)


def test_comes_back_to_a_server_that_was_away(page, live):
    live.close_with = 1001
    live.socket.close(code=1001)
    expect(page.locator("#notice")).to_contain_text("The server has stopped. Trying again in")
    live.close_with, live.socket = None, None
    live.version, live.names = 1, [["boat"]]  # it was started again with other classes
    live.wait_for(lambda: live.socket)
    live.send_frame(halves(0, 0))
    expect(page.locator("#notice")).to_be_hidden()
    has_names(page, "boat")


def test_a_server_that_falls_silent_is_left_and_asked_again(page):
    page.clock.install()
    live = ScriptedServer(page).open()
    first, live.is_mute = live.socket, True
    page.clock.run_for(25_000)  # without a word
    page.clock.run_for(2_000)
    live.wait_for(lambda: live.socket is not first)


def test_a_token_is_asked_for_and_kept_and_taken_out_of_the_address(page):
    live = ScriptedServer(page, token="s3cret")
    page.goto(live.URL)
    box = page.get_by_label("Token", exact=True)
    expect(box).to_be_focused()
    page.keyboard.type("guess")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The server does not know this token.")).to_be_visible()
    box.fill("s3cret")
    page.keyboard.press("Enter")
    live.wait_for(lambda: live.socket)
    expect(box).to_be_hidden()
    live.socket = None
    page.reload()
    live.wait_for(lambda: live.socket)
    page.evaluate("sessionStorage.clear(); localStorage.clear(); location.hash = 'token=s3cret'")
    live.socket = None
    page.reload()
    live.wait_for(lambda: live.socket)
    assert page.url == live.URL  # it is taken out of the address
    headers = []
    page.on("request", lambda request: headers.append(request.headers.get("authorization")))
    page.get_by_role("button", name="Apply").click()
    live.wait_for(lambda: live.bodies)
    assert "Bearer s3cret" in headers


LONG = [
    "a very long class name that holds a whole sentence about what is to be found in the picture",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "dog",
]
LONG_URI = "rtsp://a-camera-in-the-long-corridor.example.org:554/stream/with/path?channel=1&sub=0"
NARROW = {"size": (390, 844), "color_scheme": "dark"}


def has_no_faults(page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.wait_for_timeout(300)  # a turn of the page's own clock
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


@pytest.mark.parametrize("screen", [{"color_scheme": "light"}, NARROW])
def test_no_faults_of_access_in_any_condition(browser, screen):
    lost = source("cam", "lost", f"{LONG_URI}: the camera closed the connection.")
    two, many = [source(LONG_URI, "running"), source("cam2", "running")], map(str, range(150))
    is_narrow = screen is NARROW
    conditions = ((many, [two[1]]), (("road",), [])) if is_narrow else ((LONG, two), (LONG, [lost]))
    with open_page(browser, **screen) as page:
        live = ScriptedServer(page).open()
        for classes, sources in conditions:
            live.change(*classes)
            live.say_state(*(sources or two))
            live.send_frame(halves(0, 255))
            live.say_state(*sources)
            has_no_faults(page)
        page.goto("about:blank")
        page.goto(ScriptedServer(page, token="x").URL)
        page.get_by_role("form", name="This server asks for a token").wait_for()
        page.get_by_text("Synonyms and background").click()
        page.get_by_role("textbox", name="Look for").fill("")
        page.get_by_role("button", name="Apply").click()
        page.get_by_text("Name at least one class.").wait_for()
        has_no_faults(page)


def test_nothing_has_to_be_scrolled_sideways_or_moves(browser):
    with open_page(browser, size=(320, 844), reduced_motion="reduce") as page:
        sources = [source(LONG_URI, "lost", LONG_URI), source("cam2", "running")]
        live = ScriptedServer(page, LONG, sources=sources).open()
        live.send_frame(halves(0, 255))
        page.get_by_text("Synonyms and background").click()
        page.get_by_role("button", name="Freeze").click()
        live.change("new")
        page.get_by_text("There are new classes.").wait_for()
        for width in (320, 390, 700):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        moving = "getComputedStyle(document.querySelector('.bar i')).transitionDuration"
        assert page.evaluate(moving) == "0s"


# Accessible name of the focused element, and whether its focus can be seen; null on the body.
WHERE = """() => {
  const at = document.activeElement;
  if (at === document.body) return null;
  const ring = (element) => getComputedStyle(element).outlineStyle !== "none";
  const name = at.ariaLabel ?? at.labels?.[0]?.querySelector(".name")?.textContent
    ?? at.labels?.[0]?.textContent ?? at.textContent;
  return [name.trim(), ring(at) || ring(at.closest("#stage") ?? at)];
}"""
CONTROLS = [
    "Skip to the class names", "Camera picture with its classes", "Freeze", "Save as PNG", "Names",
    "Patterns", "Opacity", "Label a photo", "Use my webcam", "Look for", "Synonyms and background",
    "Apply", "Show all", "road", "Only road", "sky", "Only sky", "Unknown", "Only unknown",
    "Unknown below",
]  # fmt: skip


def test_every_control_is_reached_by_tab_and_shows_it(page, live):
    page.mouse.click(2, 2)
    for control in CONTROLS:
        page.keyboard.press("Tab")
        assert page.evaluate(WHERE) == [control, True]
    page.keyboard.press("Tab")
    assert page.evaluate(WHERE) is None


COUNT_ANNOUNCEMENTS = """() => {
  window.announcements = 0;
  const observer = new MutationObserver(() => { announcements += 1; });
  for (const region of document.querySelectorAll("[aria-live], [role=status], [role=alert]")) {
    observer.observe(region, { childList: true, characterData: true, subtree: true });
  }
}"""


def test_says_little_while_frames_come(page, live):
    page.wait_for_timeout(1000)
    page.evaluate(COUNT_ANNOUNCEMENTS)
    for number in range(20):
        live.send_frame(halves(number % 2, 1))
    assert page.evaluate("announcements") <= 1


_DROP = """([name, type, size, what]) => {
  const given = new DataTransfer();
  if (size) given.items.add(new File([new Uint8Array(size)], name, { type }));
  const Kind = what === "paste" ? ClipboardEvent : DragEvent;
  const key = what === "paste" ? "clipboardData" : "dataTransfer";
  const event = new Kind(what, { bubbles: true, cancelable: true, [key]: given });
  document.body.dispatchEvent(event);
}"""


def give(page, name="cat.jpg", kind="image/jpeg", size=10, what="drop"):
    page.evaluate(_DROP, [name, kind, size, what])


def is_split(page):
    """Whether the picture has the photo's labels, not the source's."""
    pixels = canvas_pixels(page)
    return not np.array_equal(pixels[4, 4], pixels[4, -4])


@pytest.mark.parametrize("way", ["drop", "paste", "choose"])
def test_a_photo_is_labelled_again_with_new_classes_until_one_goes_back(page, live, way):
    live.send_frame(halves(1, 1))
    if way == "choose":
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Label a photo").click()
        chooser.value.set_files({"name": "cat.jpg", "mimeType": "image/jpeg", "buffer": bytes(10)})
    else:
        give(page, what=way)
    expect(page.locator("#state")).to_have_text("cat.jpg")
    assert is_split(page)
    live.send_frame(halves(1, 1))  # the source goes on behind it
    assert is_split(page)
    live.change("house", "tree")
    live.wait_for(lambda: len(live.images) == 2)
    has_names(page, "house", "tree")
    page.get_by_role("button", name="Back to the source").click()
    expect(page.locator("#state")).to_have_text("Running")
    assert not is_split(page)
    assert live.images == [bytes(10)] * 2


def test_what_cannot_be_labelled_is_told_and_changes_nothing(page, live):
    live.send_frame(halves(1, 1))
    large, text = 33 * 1024 * 1024, {"name": "notes.txt", "kind": "text/plain"}
    for file, status, words in (
        (text, 422, "notes.txt cannot be read as a photo."),
        ({"size": large}, None, "cat.jpg has 33 MB. The server takes pictures of up to 32 MB"),
        ({}, 413, "cat.jpg has more pixels than the server takes."),
        ({}, 503, "The server is busy"),
        ({}, 500, "The server could not label cat.jpg."),
        ({"size": 0}, None, "That is no file."),
    ):
        live.refuse_images_with = status
        live.images.clear()
        give(page, **file)
        expect(page.locator("#complaint")).to_contain_text(words)
        expect(page.locator("#state")).to_have_text("Running")
        assert not is_split(page)
        assert len(live.images) == (status is not None)
    live.send_frame(halves(0, 0))
    expect(page.get_by_role("button", name="Back to the source")).to_be_hidden()


@pytest.fixture(scope="module")
def server():
    camera = "test://?demo=scenes&size=640x360&rate=15"
    with demo_server(camera, stream={"follow": False}) as running:  # new places would be unknown
        yield running


def visit(page, server) -> None:
    page.goto(server.address)
    page.locator("#stage:not(.empty)").wait_for()


def test_new_words_change_legend_and_pixels_and_a_snapshot_is_what_is_seen(page, server, tmp_path):
    visit(page, server)
    bare(page)
    apply(page, "blue sky, yellow sand")
    has_names(page, "blue sky", "yellow sand")
    two = colours(page)
    assert two
    assert two <= set(class_colours("blue sky", "yellow sand"))
    expect(page.locator("#announcer")).to_contain_text("2 new classes in use")

    apply(page, "purple striped cone\nred metal ball\ngreen grass\ngrey sky")
    names = page.locator("#classes .name bdi")
    expect(names).to_have_count(5)
    expect(names.filter(has_text="grey sky")).to_have_count(1)  # what is seen comes first
    page.get_by_role("button", name="Freeze").click()
    four = class_colours("purple striped cone", "red metal ball", "green grass", "grey sky")
    assert colours(page) <= set(four)
    shares = page.locator("#classes .share").all_inner_texts()
    assert 97 <= sum(int(share.strip("<% ")) for share in shares) <= 106  # each is rounded

    with page.expect_download() as download:
        page.get_by_role("button", name="Save as PNG").click()
    assert re.fullmatch(r"zsseg-[\w.-]+\.png", download.value.suggested_filename)
    download.value.save_as(tmp_path / "snapshot.png")
    saved = cv2.imread(str(tmp_path / "snapshot.png"))[..., ::-1]
    np.testing.assert_array_equal(saved, canvas_pixels(page))


def test_a_real_photo(page, server):
    visit(page, server)
    page.locator("#photo-file").set_input_files(demo_photos("scenes")[0])
    expect(page.locator("#own-help")).to_be_visible()
    expect(page.locator("#announcer")).to_contain_text("is labelled")
    assert canvas_pixels(page).shape[0] > 200
    page.locator("#photo-file").set_input_files(__file__)
    expect(page.locator("#complaint")).to_contain_text("cannot be read as a photo")
    expect(page.locator("#back")).to_be_visible()


# Browsers without a window have no camera; this one plays a canvas.
_WEBCAM = """
window.refusal = null;
navigator.mediaDevices.getUserMedia = async () => {
  if (refusal) throw new DOMException("why", refusal);
  const canvas = Object.assign(document.createElement("canvas"), { width: 320, height: 240 });
  const context = canvas.getContext("2d");
  setInterval(() => context.fillRect(0, 0, 9, Math.random() * 240), 50);
  context.fillRect(0, 0, 9, 9);
  window.webcam = canvas.captureStream(20);
  return window.webcam;
};
"""


def test_the_webcam(page, server):
    page.add_init_script(_WEBCAM)
    visit(page, server)
    button, state = page.get_by_role("button", name="Use my webcam"), page.locator("#state")
    complaint = page.locator("#complaint")
    for kind, words in {
        "NotAllowedError": "did not let this page use the webcam",
        "NotFoundError": "finds no webcam",
        "NotReadableError": "Another program may be using it",
        "OtherError": "The webcam cannot be used: why",
    }.items():
        page.evaluate(f"refusal = '{kind}'")
        button.click()
        expect(complaint).to_contain_text(words)
        expect(state).to_have_text("Running")
    page.evaluate("refusal = null")
    button.click()
    expect(state).to_have_text("Your webcam")
    expect(page.locator("#rate")).to_have_text(re.compile(r"\d"))
    expect(page.locator("#picture")).to_have_js_property("width", 320)
    page.evaluate("webcam.getVideoTracks()[0].onended()")  # it was unplugged
    expect(complaint).to_contain_text("unplugged")
    expect(state).to_have_text("Running")
    button.click()
    expect(state).to_have_text("Your webcam")
    button.click()
    expect(state).to_have_text("Running")
    assert page.evaluate("webcam.getVideoTracks()[0].readyState") == "ended"  # let go
