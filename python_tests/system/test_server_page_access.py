"""The page by keyboard, with screen readers, on phones, in Chromium."""

import pytest

from support.live_page import (
    ScriptedServer,
    accessibility_faults,
    halves,
    open_page,
    overflow,
    source,
)

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
