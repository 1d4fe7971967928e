"""What the page makes of pictures and labels, in Chromium, with a scripted server."""

import re
import time

import numpy as np
import pytest

from support.live_page import (
    ScriptedServer,
    canvas_pixels,
    class_colours,
    colours_of,
    expect,
    halves,
    legend_names,
    set_slider,
    source,
)

ROAD, SKY, TREE = class_colours("road", "sky", "tree")
GREY = (128, 128, 128)  # the scripted server's picture


def bare(page) -> None:
    """Show the labels' own colours: no names, full opacity."""
    page.get_by_label("Names", exact=True).uncheck()
    set_slider(page, "Opacity", 100)


class TestPicture:
    def test_each_pixel_has_the_colour_of_its_label(self, page):
        live = ScriptedServer(page).open()
        assert not page.evaluate("isSecureContext")  # as in a local network
        labels = halves(0, 1)
        labels[3, 5] = 255
        live.send_frame(labels)
        bare(page)
        table = np.array([ROAD, SKY], np.uint8)
        expected = np.where(labels[..., None] == 255, GREY, table[np.minimum(labels, 1)])
        doubled = expected.repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(canvas_pixels(page), doubled)

    def test_labels_that_were_moved_are_told_from_computed_ones(self, page):
        live = ScriptedServer(page).open()
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
        told = page.locator("#source-list")
        expect(told).to_contain_text("8 labelled, 80 given out with labels")
        expect(told).to_contain_text("Labels are of frames 240 ms ago (median)")

    def test_labels_of_many_classes_have_two_bytes(self, page):
        names = [f"thing {i}" for i in range(300)]
        live = ScriptedServer(page, names).open()
        live.send_frame(halves(299, 65535, dtype=np.uint16))
        bare(page)
        assert colours_of(canvas_pixels(page)) == {class_colours(*names)[299], GREY}

    @pytest.mark.parametrize("opacity", [0, 50, 100])
    def test_opacity_blends_colours_and_picture(self, page, opacity):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 0))
        bare(page)
        set_slider(page, "Opacity", opacity)
        expected = np.array(GREY) + opacity / 100 * (np.array(ROAD) - GREY)
        seen = canvas_pixels(page).astype(int)
        assert np.abs(seen - expected).max() <= 1  # 8-bit alpha

    def test_patterns_tell_classes_apart_without_colour(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(1, 1))
        bare(page)
        assert colours_of(canvas_pixels(page)) == {SKY}
        page.get_by_label("Patterns").check()
        assert len(colours_of(canvas_pixels(page))) == 2  # strong and weak, in the same colour

    def test_a_damaged_frame_is_reported_and_the_next_one_is_drawn(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 0), label_width=7)
        expect(page.get_by_text("A picture could not be read")).to_be_visible()
        live.send_frame(halves(1, 1))
        bare(page)
        assert colours_of(canvas_pixels(page)) == {SKY}

    def test_classes_that_come_after_their_first_frame_are_drawn(self, page):
        live = ScriptedServer(page).open()
        live.version, live.names = 2, [["tree"], ["house"]]
        live.send_frame(halves(0, 1))
        bare(page)
        assert colours_of(canvas_pixels(page)) == {GREY}
        live.say_vocabulary()
        expect(page.locator("#classes .name bdi")).to_have_text(["tree", "house", "Unknown"])
        assert colours_of(canvas_pixels(page)) == set(class_colours("tree", "house"))

    def test_freeze_keeps_the_picture_and_lets_the_stream_go_on(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 0))
        bare(page)
        page.get_by_role("button", name="Freeze").click()
        for _ in range(3):
            live.send_frame(halves(1, 1))  # waits until it was acknowledged
        assert colours_of(canvas_pixels(page)) == {ROAD}
        live.change("cat", "dog")
        expect(page.get_by_text("You see them when you end the freeze")).to_be_visible()
        assert legend_names(page) == ["road", "sky", "Unknown"]
        page.get_by_role("button", name="Freeze").click()
        live.send_frame(halves(1, 1))
        assert colours_of(canvas_pixels(page)) == {class_colours("cat", "dog")[1]}
        assert set(legend_names(page)) == {"cat", "dog", "Unknown"}


class TestLegend:
    def test_hides_and_shows_single_classes(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 1))
        bare(page)
        box = page.get_by_role("checkbox", name="road")
        box.uncheck()
        assert colours_of(canvas_pixels(page)) == {GREY, SKY}
        box.check()
        assert colours_of(canvas_pixels(page)) == {ROAD, SKY}

    def test_shows_a_class_alone_and_all_again(self, page):
        live = ScriptedServer(page, ["road", "sky", "tree"]).open()
        live.send_frame(halves(1, 2))
        bare(page)
        page.get_by_role("button", name="Only tree").click()
        assert colours_of(canvas_pixels(page)) == {GREY, TREE}
        assert not page.get_by_role("checkbox", name="sky").is_checked()
        page.get_by_role("button", name="Show all").click()
        assert colours_of(canvas_pixels(page)) == {SKY, TREE}

    def test_unknown_pixels_are_painted_when_asked_for(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 255))
        bare(page)
        page.get_by_role("button", name="Only unknown").click()
        colours = colours_of(canvas_pixels(page))
        assert ROAD not in colours
        assert len(colours) == 3  # the picture where the road is; two greys

    def test_tells_shares_of_what_is_there_first(self, page):
        live = ScriptedServer(page, ["road", "sky", "tree"]).open()
        labels = np.full((24, 32), 2, np.uint8)
        labels[:6] = 1
        labels[6:12] = 255
        live.send_frame(labels)
        expect(page.locator("#classes .share")).to_have_text(["25 %", "50 %", "0 %", "25 %"])
        assert legend_names(page) == ["sky", "tree", "road", "Unknown"]

    def test_absent_classes_of_many_can_be_left_out(self, page):
        live = ScriptedServer(page, [f"thing {i}" for i in range(150)]).open()
        live.send_frame(halves(70, 149))
        page.get_by_label("In the picture only").check()
        expect(page.locator("#classes li:visible bdi")).to_have_text(
            ["thing 70", "thing 149", "Unknown"]
        )

    def test_markup_in_a_name_stays_text(self, page):
        name = "<img src=x onerror=document.title='owned'>"
        live = ScriptedServer(page, [name, ["sky", "<b>blue</b>"]]).open()
        live.send_frame(halves(0, 1))
        expect(page.locator("#classes .name").first).to_have_text(name)
        expect(page.locator("#classes small")).to_have_text("or <b>blue</b>")
        live.say_state(source(name, "lost", name), source("<i>", "running"))
        expect(page.locator("#source-list .error:visible")).to_have_text(name)
        assert page.locator("img, b, i:not(.bar i)").count() == 0
        assert page.title() != "owned"


class TestPointing:
    def test_the_pointer_tells_the_class(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 255))
        box = page.locator("#picture").bounding_box()
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
        expect(page.get_by_text("Here: road")).to_be_visible()
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.5 * box["height"])
        expect(page.get_by_text("Here: unknown")).to_be_visible()
        page.mouse.move(2, 2)
        expect(page.get_by_text("Here:")).to_have_count(0)

    def test_arrow_keys_move_a_cross_hair_and_are_announced(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 1))
        page.get_by_role("application", name="Camera picture").focus()
        page.keyboard.press("Shift+ArrowLeft")
        page.keyboard.press("Shift+ArrowLeft")
        expect(page.locator("#crosshair")).to_be_visible()
        expect(page.get_by_text("Here: road")).to_be_visible()
        expect(page.locator("#announcer")).to_contain_text(
            "road, 40 % from the left, 50 % from the top"
        )
        for _ in range(3):
            page.keyboard.press("Shift+ArrowRight")
        expect(page.locator("#announcer")).to_have_text(re.compile("sky, 70 % from the left"))
        page.keyboard.press("Enter")
        expect(page.locator("#announcer")).to_contain_text("road 50 %, sky 50 %")
        page.keyboard.press("Escape")
        expect(page.locator("#crosshair")).to_be_hidden()
