"""The gallery in a real browser, from a disk: 10,000 pictures stay usable, words filter, no message and nothing fetched."""

import io
import shutil

import pytest
from PIL import Image

from pipelines import gallery

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
NUM, UNIT = 10_000, 64


def png(color) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(data, "PNG")
    return data.getvalue()


def row(number: int) -> dict:
    made = {"file": f"images/{number % 20}#%.png", "width": 64, "height": 64, "settings": '{"cfg": [4.0], "size": "auto"}'}
    outcome = {"error": "there is no image none.png"} if number == 5 else made
    prompt = "<script>alert(1)</script> & co" if number == 3 else f"a picture number {number:05d}"
    return {
        "id": f"id-{number}",
        "prompt": prompt,
        "seed": number,
        "extra": '{"cell": "steps4-cfg2"}' if number % 2 else None,
    } | outcome


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    root = tmp_path_factory.mktemp("gallery output")
    for name in ("images", gallery.DIRECTORY):
        (root / name).mkdir()
    for number in range(20):
        (root / f"images/{number}#%.png").write_bytes(png((12 * number, 0, 0)))
    chunks = []
    for start in range(0, NUM, UNIT):
        rows = [row(number) for number in range(start, min(NUM, start + UNIT))]
        chunks.append((f"{start // UNIT:06d}-x", len(rows)))
        pictures = {"id-0": png("blue")} if start == 0 else {}  # as if it lay in a shard
        (root / gallery.DIRECTORY / f"{chunks[-1][0]}.js").write_bytes(gallery.chunk(chunks[-1][0], rows, pictures))
    (root / "index.html").write_bytes(gallery.page("s3://me/out put</script>", chunks, failed=1))
    return root


@pytest.fixture
def page(output):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.messages, page.requested = [], []
        page.on("console", lambda message: page.messages.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto((output / "index.html").as_uri())
        page.wait_for_selector("figure")
        yield page
        assert page.messages == []
        assert all(url.startswith(("file:", "data:")) for url in page.requested)
        browser.close()


def shown(page, text: str) -> None:
    page.wait_for_function("text => document.querySelector('#page').textContent === text", arg=text)


def test_large_sets_stay_usable(page, tmp_path_factory):
    shown(page, "page 1 of 105")
    assert page.text_content("#count") == "9999 pictures, 1 failed"
    assert page.locator("figure").count() == 96
    assert sum(url.endswith(".js") for url in page.requested) == 2  # of 157
    page.wait_for_function("[...document.querySelectorAll('figure img')].slice(0, 4).every(image => image.naturalWidth === 64)")
    assert page.locator("figure").nth(3).text_content() == "<script>alert(1)</script> & co"
    assert "no image none.png" in page.locator("figure").nth(5).text_content()
    assert page.locator("figure img").first.get_attribute("src").startswith("data:image/webp")
    page.screenshot(path=tmp_path_factory.getbasetemp() / "gallery.png")
    page.click("#next")
    shown(page, "page 2 of 105")
    assert page.locator("figcaption").first.text_content() == "a picture number 00096"
    page.click("#back")
    shown(page, "page 1 of 105")
    assert page.is_disabled("#back")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    page.screenshot(path=tmp_path_factory.getbasetemp() / "gallery-phone-dark.png")


def test_words_filter(page):
    page.fill("#filter", "NUMBER 09999")
    shown(page, "page 1 of 1")
    assert page.locator("figcaption").all_text_contents() == ["a picture number 09999"]
    page.fill("#filter", "steps4-cfg2")
    shown(page, "page 1 of 2+")
    page.click("#next")
    shown(page, "page 2 of 3+")
    page.fill("#filter", "nothing like it")
    page.wait_for_function("document.querySelectorAll('figure').length === 0")
    page.fill("#filter", "")
    shown(page, "page 1 of 105")


def test_a_click_shows_how_it_was_made(page):
    page.locator("figure").nth(1).click()
    page.wait_for_selector("dialog[open]")
    text = page.text_content("#settings")
    assert "id-1" in text and "[4]" in text and "steps4-cfg2" in text and "64x64" in text
    command = "python pipelines/generate.py --output 's3://me/out put</script>' --reproduce id-1"
    assert page.text_content("#command") == command
    page.click("#copy")
    page.wait_for_function("document.querySelector('#copy').textContent === 'Copied'")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


def test_an_address_can_carry_a_filter(page, output):
    page.goto((output / "index.html").as_uri() + "#picture%20number%2000042")
    page.reload()
    shown(page, "page 1 of 1")
    assert page.locator("figure").count() == 1
