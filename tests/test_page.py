"""The page in a real browser: pictures with previews on the way, inpainting by painting, errors shown, nothing on the console."""

import shutil

import pytest
from served import KEYS
from test_serve import png

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture
def address(server):
    return server[0]


def told(message) -> bool:
    """Whether something is wrong, but for what the browser says of the models that were asked for before there was a key."""
    return message.type in ("error", "warning") and "401" not in message.text


@pytest.fixture
def page(address):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.messages, page.requested = [], []
        page.on("console", lambda message: page.messages.append(message.text) if told(message) else None)
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(address)
        page.fill("#key", KEYS[0])
        page.press("#key", "Tab")
        page.wait_for_function("document.querySelector('#model').options.length == 1")
        yield page
        browser.close()


def done(page, number):
    page.wait_for_function(
        "number => document.querySelectorAll('figure:not(.going) img[src^=data]').length >= number"
        " && !document.querySelector('#go').disabled",
        arg=number,
    )


def test_a_prompt_gives_pictures_with_previews(page, address, tmp_path_factory):
    shots = tmp_path_factory.getbasetemp()
    page.fill("#num_inference_steps", "40")
    page.fill("#prompt", "a red circle")
    page.check("#lock")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("figure.going img[src^=data]")
    page.screenshot(path=shots / "page-preview.png")
    done(page, 2)
    assert page.evaluate("[...document.querySelectorAll('figure img')].every(image => image.dataset.previews >= 1)")
    assert page.get_attribute("figure img", "alt") == "a red circle"
    assert page.input_value("#seed") != ""
    page.screenshot(path=shots / "page-done.png", full_page=True)
    page.reload()
    page.wait_for_selector("figure a[download]")  # the history
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    page.screenshot(path=shots / "page-phone-dark.png", full_page=True)
    unlabelled = page.evaluate(
        "[...document.querySelectorAll('input,select,textarea')].filter(e => !e.labels?.length && !e.ariaLabel).map(e => e.id)"
    )
    assert unlabelled == []
    assert page.messages == []
    assert all(url.startswith((address, "data:", "blob:")) for url in page.requested)


def test_inpainting_by_painting(page, tmp_path_factory):
    page.select_option("#mode", "inpaint")
    page.set_input_files("#upload", {"name": "red.png", "mimeType": "image/png", "buffer": png()})
    page.wait_for_selector("#sources img")
    page.fill("#n", "1")
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.7, steps=5)
    page.mouse.up()
    page.screenshot(path=tmp_path_factory.getbasetemp() / "page-mask.png", full_page=True)
    page.click("#go")
    done(page, 1)
    left, right = page.evaluate(
        """async () => {
          const image = document.querySelector('figure img'), canvas = document.createElement('canvas');
          await image.decode();
          [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
          const context = canvas.getContext('2d', { willReadFrequently: true });
          context.drawImage(image, 0, 0);
          return [[8, 32], [48, 32]].map(([x, y]) => [...context.getImageData(x, y, 1, 1).data]);
        }"""
    )
    assert left == [255, 0, 0, 255]
    assert right != left
    assert page.messages == []


def test_an_error_is_shown_and_curl_is_copied(page):
    page.fill("#size", "65x64")
    page.click("#go")
    page.wait_for_function("document.querySelector('#error').textContent.includes('65x64')")
    page.click("#curl")
    page.wait_for_function("document.querySelector('#status').textContent != ''")
    assert all("400" in message for message in page.messages)  # what the browser itself says of a refused request
