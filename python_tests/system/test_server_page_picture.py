"""What the page draws, asks for and says, in Chromium, with a scripted server."""

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


class TestPrompt:
    @pytest.mark.parametrize(
        ("text", "comma", "classes"),
        [
            ("cat\n dog \n\n# not this\nbird", "classes", ["cat", "dog", "bird"]),
            ("cat, dog,, bird", "classes", ["cat", "dog", "bird"]),
            ("dog, puppy\ncat", "synonyms", [["dog", "puppy"], "cat"]),
        ],
    )
    def test_reads_lines_and_commas(self, page, text, comma, classes):
        live = ScriptedServer(page).open()
        page.get_by_text("Synonyms and background").click()
        page.get_by_role("radio", name=comma).check()
        page.get_by_label("Background").fill("wall, floor")
        page.get_by_role("textbox", name="Look for").fill(text)
        page.get_by_role("button", name="Apply").click()
        live.wait_for(lambda: live.bodies)
        asked = {"classes": classes, "background": ["wall", "floor"]}
        assert live.bodies == [("v1/vocabulary", asked)]
        names = [group if isinstance(group, str) else group[0] for group in classes]
        expect(page.locator("#classes .name bdi")).to_have_text([*names, "Unknown"])

    @pytest.mark.parametrize("text", ["auto", " none ", "wall,"])
    def test_the_background_is_chosen_until_somebody_writes_one(self, page, text):
        live = ScriptedServer(page)
        live.background, live.auto_background = ["background", "sheep"], True
        live.open()
        page.get_by_text("Synonyms and background").click()
        expect(page.get_by_label("Background")).to_have_value("auto")
        expect(page.locator("#background-help")).to_contain_text("Now: background, sheep.")
        page.get_by_role("textbox", name="Look for").fill("sheep")
        page.get_by_role("button", name="Apply").click()
        live.wait_for(lambda: live.bodies)
        assert live.bodies == [("v1/vocabulary", {"classes": ["sheep"], "background": "auto"})]
        page.get_by_label("Background").fill(text)
        page.get_by_role("button", name="Apply").click()
        live.wait_for(lambda: len(live.bodies) == 2)
        assert live.bodies[1][1]["background"] == (["wall"] if "wall" in text else text.strip())

    def test_an_error_is_shown_beside_the_box(self, page):
        live = ScriptedServer(page).open()
        live.refuse_with = 422, "class_names[1]: expected a new name, got 'cat' twice"
        box = page.get_by_role("textbox", name="Look for")
        box.fill("cat\ncat")
        box.press("Control+Enter")
        error = page.get_by_role("alert").filter(has_text="got 'cat' twice")
        expect(error).to_be_visible()
        expect(box).to_have_attribute("aria-invalid", "true")
        expect(box).to_be_focused()
        expect(box).to_have_value("cat\ncat")
        live.refuse_with = None
        box.fill("cat")
        box.press("Control+Enter")
        expect(error).to_have_count(0)

    def test_all_unknown_names_are_told_in_the_page_s_own_words(self, page):
        live = ScriptedServer(page).open()
        live.refuse_with, live.unknown = (422, "class_names: expected ..."), ["zebra", "quark"]
        page.get_by_role("textbox", name="Look for").fill("zebra\nsky\nquark")
        page.get_by_role("button", name="Apply").click()
        expect(page.locator("#words-error")).to_contain_text("does not know “zebra”, “quark”.")
        expect(page.locator("#words-error")).not_to_contain_text("class_names")

    def test_names_of_the_bank_are_suggested_while_typing(self, page):
        live = ScriptedServer(page)
        live.known_names = ["cat", "caterpillar", "tea cat", "car", "dog"]
        live.open()
        box, offered = page.get_by_role("textbox", name="Look for"), page.locator("#suggestions")
        box.fill("")
        expect(offered).to_be_hidden()
        box.press_sequentially("dog, Cat")
        expect(offered.get_by_role("button")).to_have_text(["caterpillar", "tea cat"])
        box.press("Backspace")
        expect(offered.get_by_role("button")).to_have_text(["cat", "caterpillar", "car", "tea cat"])
        offered.get_by_role("button", name="caterpillar").click()
        expect(box).to_have_value("dog, caterpillar")
        expect(offered).to_be_hidden()
        expect(box).to_be_focused()
        box.press_sequentially("\nq")
        expect(offered).to_be_hidden()

    def test_phrases_of_known_words_are_suggested_after_names(self, page):
        live = ScriptedServer(page)
        live.known_names, live.known_words = ["red metal ball"], ["ball", "box", "metal", "red"]
        live.open()
        box, offered = page.get_by_role("textbox", name="Look for"), page.locator("#suggestions")
        box.fill("")
        box.press_sequentially("re")
        expect(offered.get_by_role("button")).to_have_text(["red metal ball", "red"])
        box.fill("")
        box.press_sequentially("red b")
        expect(offered.get_by_role("button")).to_have_text(["red ball", "red box"])
        offered.get_by_role("button", name="red box").click()
        expect(box).to_have_value("red box")

    def test_remarks_on_names_are_shown_under_the_form(self, page):
        live = ScriptedServer(page)
        live.remarks = ["class_names: 'tree': this model sees no trees.", "class_names: 'a'."]
        live.open()
        note = page.locator("#words-remarks")
        expect(note).to_have_text("'tree': this model sees no trees.\n'a'.")
        expect(note).to_have_role("status")
        live.remarks = []
        live.change("dog")
        expect(note).to_be_hidden()

    def test_classes_in_the_picture_come_first(self, page):
        live = ScriptedServer(page, ("road", "sky", "tree")).open()
        live.send_frame(halves(2, 2))
        names = page.locator("#classes .name bdi")
        expect(names).to_have_text(["tree", "road", "sky", "Unknown"])
        page.get_by_role("checkbox", name="road").focus()
        live.send_frame(halves(1, 1))
        page.wait_for_timeout(600)
        assert legend_names(page) == ["tree", "road", "sky", "Unknown"]  # not under somebody's hand
        page.get_by_role("button", name="Freeze").focus()
        expect(names).to_have_text(["sky", "tree", "road", "Unknown"])

    def test_no_class_is_refused_without_asking_the_server(self, page):
        live = ScriptedServer(page).open()
        page.get_by_role("textbox", name="Look for").fill(" ,\n")
        page.get_by_role("button", name="Apply").click()
        expect(page.get_by_text("Name at least one class.")).to_be_visible()
        assert live.bodies == []

    def test_what_is_being_typed_survives_what_others_choose(self, page):
        live = ScriptedServer(page).open()
        box = page.get_by_role("textbox", name="Look for")
        box.fill("cat")
        live.change("house", "tree")
        live.send_frame(halves(0, 1))
        expect(page.locator("#classes .name bdi")).to_have_text(["house", "tree", "Unknown"])
        expect(box).to_have_value("cat")
        page.get_by_role("button", name="Undo").click()
        expect(box).to_have_value("house\ntree")
        live.change("boat")
        expect(box).to_have_value("boat")

    def test_the_legend_says_that_new_classes_are_on_their_way(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 1))
        live.change("cat")
        expect(page.get_by_text("New classes are set.")).to_be_visible()
        live.send_frame(halves(0, 0))
        expect(page.get_by_text("New classes are set.")).to_be_hidden()
        expect(page.locator("#announcer")).to_have_text(re.compile("1 new class in use"))

    def test_the_unknown_threshold_is_sent_once_it_rests(self, page):
        live = ScriptedServer(page).open()
        slider = page.get_by_role("slider", name="Unknown below")
        slider.focus()
        for _ in range(5):
            page.keyboard.press("ArrowRight")
        live.wait_for(lambda: live.unknown_below == 0.05)
        assert {path for path, _ in live.bodies} == {"v1/settings"}
        live.refuse_with = 422, "unknown_below: expected a score that this bundle has"
        slider.fill("0.5")
        expect(page.get_by_text("expected a score that this bundle has")).to_be_visible()
        live.say_vocabulary()
        expect(slider).to_have_value("0.05")


class TestState:
    @pytest.mark.parametrize(
        ("state", "words"),
        [
            ("starting", "Opening the camera"),
            ("stalled", "The camera sends nothing"),
            ("lost", "Camera lost, trying again"),
            ("ended", "The source has ended. This is its last picture"),
        ],
    )
    def test_a_source_that_does_not_run_is_told_in_words(self, page, state, words):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 1))
        live.say_state(source("rtsp://cam/1", state, "Check its power."))
        expect(page.locator("#notice")).to_have_text(f"{words}. Check its power.")
        live.say_state(source("rtsp://cam/1", "running"))
        expect(page.locator("#notice")).to_be_hidden()
        expect(page.locator("#status")).to_contain_text("Running")

    def test_files_have_no_age(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 1))
        live.say_state(source("video.mp4", "running") | {"live": False})
        expect(page.locator("#age-box")).to_be_hidden()
        expect(page.locator("#source-list")).not_to_contain_text("From capture to labels")
        live.say_state(source("cam", "running") | {"live": True})
        expect(page.locator("#age-box")).to_be_visible()

    def test_of_several_sources_one_is_watched(self, page):
        live = ScriptedServer(page)
        live.sources = [source("cam/1", "running"), source("cam/2", "lost")]
        live.open()
        live.wait_for(lambda: live.taken("watch"))
        choice = page.get_by_label("Source", exact=True)
        choice.select_option("cam/2")
        expect(page.locator("#notice")).to_contain_text("Camera lost, trying again")
        choice.select_option("All in turns")
        expect(page.locator("#status")).to_contain_text("1 of 2 sources running")
        live.wait_for(lambda: len(live.taken("watch")) == 3)
        assert [message["source"] for message in live.taken("watch")] == ["cam/1", "cam/2", None]

    def test_another_cameras_picture_does_not_stay(self, page):
        live = ScriptedServer(page)
        live.sources = [source("cam/1", "running"), source("cam/2", "lost")]
        live.open()
        live.wait_for(lambda: live.taken("watch"))
        live.send_frame(halves(0, 1), source="cam/1")
        freeze = page.get_by_role("button", name="Freeze")
        expect(freeze).to_be_enabled()
        page.get_by_label("Source", exact=True).select_option("cam/2")
        expect(freeze).to_be_disabled()
        live.send_frame(halves(0, 1), source="cam/1")  # it was under way
        expect(freeze).to_be_disabled()
        expect(page.locator("#classes .share").first).to_have_text("\u2013")
        live.send_frame(halves(0, 1), source="cam/2")
        expect(freeze).to_be_enabled()

    def test_a_hidden_page_asks_for_nothing_until_it_is_seen(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 1))
        page.evaluate("Object.defineProperty(document, 'hidden', { value: true, writable: true })")
        live.socket.send(live.frame(halves(1, 1)))
        page.wait_for_timeout(1000)
        assert len(live.taken("ack")) == 1
        page.evaluate(
            "document.hidden = false; document.dispatchEvent(new Event('visibilitychange'))"
        )
        live.wait_for(lambda: len(live.taken("ack")) == 2)

    def test_age_is_measured_with_the_servers_clock(self, page):
        live = ScriptedServer(page).open()
        live.wait_for(lambda: live.taken("ping"))
        shown = page.locator("#age")
        live.send_frame(halves(0, 1), age_ms=90_000)
        live.wait_for(lambda: re.fullmatch(r"\d+ s", shown.inner_text()))
        assert 89 <= int(shown.inner_text().split()[0]) <= 119

    def test_comes_back_to_a_server_that_was_away(self, page):
        live = ScriptedServer(page).open()
        live.send_frame(halves(0, 1))
        live.close_with = 1001
        live.socket.close(code=1001)
        expect(page.locator("#notice")).to_contain_text("The server has stopped. Trying again in")
        live.close_with, live.socket = None, None
        live.version, live.names = 1, [["boat"]]  # it was started again with other classes
        live.wait_for(lambda: live.socket)
        live.send_frame(halves(0, 0))
        expect(page.locator("#notice")).to_be_hidden()
        assert legend_names(page) == ["boat", "Unknown"]

    def test_a_server_that_falls_silent_is_left_and_asked_again(self, page):
        page.clock.install()
        live = ScriptedServer(page).open()
        first, live.is_mute = live.socket, True
        page.clock.run_for(25_000)  # without a word
        page.clock.run_for(2_000)
        live.wait_for(lambda: live.socket is not first)

    def test_a_token_is_asked_for_and_kept_over_a_reload(self, page):
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

    def test_a_token_in_the_address_is_taken_out_of_it(self, page):
        live = ScriptedServer(page, token="s3cret").open("#token=s3cret")
        assert page.url == live.URL
        headers = []
        page.on("request", lambda request: headers.append(request.headers.get("authorization")))
        page.get_by_role("button", name="Apply").click()
        live.wait_for(lambda: live.bodies)
        assert "Bearer s3cret" in headers
