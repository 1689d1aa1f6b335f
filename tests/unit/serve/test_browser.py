"""The page in a real browser: Debian's chromium, driven by playwright, which downloads nothing."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def page(browser, start):
    """The page of a server, with the requests that it made and what went wrong in it."""
    _, port, _ = start()
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.asked, page.troubles = [], []
    page.on("request", lambda request: page.asked.append((request.method, request.url)))
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("console", lambda message: page.troubles.append(message.text) if message.type == "error" else None)
    page.goto(f"http://127.0.0.1:{port}/")
    wait_until(page, "document.getElementById('card').textContent.length > 0")
    yield page
    own = (f"http://127.0.0.1:{port}/", f"blob:http://127.0.0.1:{port}/", "data:")
    assert [url for _, url in page.asked if not url.startswith(own)] == []
    # A refusal by the server is a line of the console, too; scripts that fail or break the policy are not.
    assert [trouble for trouble in page.troubles if "Failed to load resource" not in trouble] == []
    page.close()


def wait_until(page, condition: str) -> None:
    """Wait for a condition; playwright's own way would need `unsafe-eval` in the page's policy."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"in vain waited for {condition}")


def upload(page, name: str, contents: bytes) -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/jpeg", "buffer": contents})


def test_two_faces_have_boxes_bars_and_maps(page, two_faces):
    assert "annotators would give" in page.inner_text("#notice")
    assert page.locator("#model option").all_inner_texts() == ["one · none · adam", "two · none · adam"]
    upload(page, "two.png", two_faces)
    page.wait_for_selector(".face")
    assert page.inner_text("#status") == "2 faces found."
    assert page.locator(".face h3").all_inner_texts()[0].startswith("Face 1: dark, 9")
    assert page.locator(".face").nth(1).locator("tbody th").all_inner_texts() == ["dark", "grey", "bright"]
    assert page.get_attribute("#canvas", "aria-label") == "The picture with face 1, dark; face 2, bright"
    drawn = page.evaluate("(() => { const c = document.getElementById('canvas'); return [c.width, c.height]; })()")
    assert drawn == [800, 400]
    # The white line of the second box, where without it 30 meets 230.
    white = "Math.max(...document.getElementById('canvas').getContext('2d').getImageData(390, 200, 20, 1).data.filter((v, i) => i % 4 == 0))"
    assert page.evaluate(white) == 255
    second = page.locator(".face").nth(1)
    assert second.locator(".steps li").all_inner_texts() == ["1. picture", "2. face found", "3. given to the model"]
    assert [second.locator(f".steps {kind}").count() for kind in ("canvas[aria-label]", "img[alt]")] == [2, 1]
    assert second.locator(".steps img").evaluate("image => image.complete && image.naturalWidth") == 40
    second.locator(".label").select_option("grey")
    second.locator(".explain").click()
    second.locator(".map").wait_for()
    assert second.locator(".heat").get_attribute("alt").startswith("Occlusion map of grey: Without occlusion")
    assert second.locator(".heat").evaluate("image => image.complete && image.naturalWidth") == 384
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_another_model_and_the_whole_picture_are_asked_for(page, two_faces):
    upload(page, "two.png", two_faces)
    page.wait_for_selector(".face")
    with page.expect_response("**/v1/predict") as told:
        page.select_option("#model", "two")
    assert told.value.json()["model"] == "two"
    with page.expect_response("**/v1/predict"):
        page.check("#whole")
    wait_until(page, "document.querySelectorAll('.face').length === 1")
    assert page.inner_text("#status") == "1 face (the whole picture)."


def test_no_face_is_said(page, png):
    upload(page, "wall.png", png(np.full((60, 60, 3), 127, np.uint8)))
    wait_until(page, "document.getElementById('status').textContent.startsWith('No face was found')")
    assert page.locator(".face").count() == 0


def test_a_text_that_is_called_jpg_is_refused_in_words(page, two_faces):
    upload(page, "photo.jpg", b"these are only words\n" * 20)
    page.wait_for_selector("#problem:not([hidden])")
    assert "photo.jpg: not a picture in a supported format" in page.inner_text("#problem")
    upload(page, "two.png", two_faces)  # and the page goes on
    page.wait_for_selector(".face")
    assert not page.is_visible("#problem")


def test_two_hundred_megapixels_are_refused_in_words(page, huge_png):
    upload(page, "huge.png", huge_png)
    page.wait_for_selector("#problem:not([hidden])")
    assert "pixels" in page.inner_text("#problem")
    assert page.locator(".face").count() == 0


def test_the_keyboard_reaches_everything(page, two_faces):
    upload(page, "two.png", two_faces)
    page.wait_for_selector(".face")
    reached = []
    page.evaluate("document.activeElement.blur()")
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert [
        name for name in ("skip", "model", "file", "camera", "whole", "label", "explain") if name not in reached
    ] == []
    unnamed = "[...document.querySelectorAll('input, select, button')].filter(e => !e.labels?.length && !e.textContent.trim()).length"
    assert page.evaluate(unnamed) == 0


def test_the_camera_sends_nothing_before_it_is_told_to_and_is_off_after(page):
    page.click("#camera")
    wait_until(page, "document.getElementById('video').videoWidth > 0")
    assert page.is_visible("#snap")
    assert [method for method, _ in page.asked if method == "POST"] == []
    page.check("#whole")
    with page.expect_response("**/v1/predict") as told:
        page.click("#snap")
    assert told.value.status == 200
    page.wait_for_selector(".face")
    assert not page.is_visible("#video")
    assert page.evaluate("document.getElementById('video').srcObject") is None


def test_the_key_is_asked_for_and_kept_in_the_page_alone(browser, start, two_faces):
    _, port, _ = start(key="a-key-of-many-letters")
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#key-row:not([hidden])")
    page.fill("#key", "a-key-of-many-letters")
    page.keyboard.press("Enter")
    wait_until(page, "document.getElementById('card').textContent.length > 0")
    upload(page, "two.png", two_faces)
    page.wait_for_selector(".face")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.close()
