"""The page at `/` in headless Chromium: phone and desktop, light and dark. Skipped aloud where there is no Chromium.

MOELLON_SCREENSHOTS=DIR keeps pictures for people."""

import os
import pathlib
import shutil
import urllib.error
import urllib.request

import pytest

from servers import KEY

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt install chromium)")

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
LONG = "Tell me a long story."


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, scripted):
    """Opens the page in a window of its own; anything that it logs as an error fails the test."""
    contexts, errors = [], []

    def open_page(size, scheme="light", phone=False):
        context = browser.new_context(
            viewport=size, color_scheme=scheme, has_touch=phone, is_mobile=phone,
            device_scale_factor=2, http_credentials={"username": "me", "password": KEY},
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: errors.append(request.url) if not request.url.startswith(scripted.url) else None)
        page.goto(scripted.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def keep(page, name):
    folder = os.environ.get("MOELLON_SCREENSHOTS")
    if folder:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=pathlib.Path(folder) / f"{name}.png")


def ask(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_chat_with_thought_and_numbers(open_page, size, scheme):
    page = open_page(size, scheme, phone=size is PHONE)
    playwright.expect(page.locator("#model")).to_contain_text("tiny")
    keep(page, f"empty-{size['width']}-{scheme}")
    ask(page, "Say hello.")
    answer = page.locator(".message.assistant")
    playwright.expect(answer.locator(".answer")).to_have_text("Hello from the script.")
    playwright.expect(answer.locator(".foot")).to_contain_text("tok/s")
    answer.locator("summary").click()
    playwright.expect(answer.locator("details .thought")).to_have_text("Let me think.")
    ask(page, "And again?")
    playwright.expect(page.locator(".message.assistant .answer").nth(1)).to_have_text("Hello from the script.")
    keep(page, f"chat-{size['width']}-{scheme}")
    # Nothing is cut off or needs scrolling sideways.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for name in ["#input", "#send", "#brief" if size is PHONE else "#speed"]:
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"], name
        assert box["y"] >= 0 and box["y"] + box["height"] <= size["height"], name
    page.click("#clear")
    assert page.locator(".message").count() == 0


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_queue_shows_requests_and_cancels_them(open_page, size):
    page = open_page(size, phone=size is PHONE)
    if size is PHONE:
        # The numbers are folded into one line there.
        playwright.expect(page.locator("#brief")).to_contain_text("tok/s")
        page.click("#brief")
    ask(page, LONG)
    row = page.locator("#queue tr", has_text="decode")
    playwright.expect(row).to_have_count(1, timeout=10_000)
    playwright.expect(page.locator("#speed")).not_to_have_text("0.0", timeout=10_000)
    keep(page, f"queue-{size['width']}")
    assert page.evaluate("parseFloat(document.querySelector('#bandwidth').style.width) > 0")
    row.get_by_role("button").click()
    playwright.expect(page.locator(".message.error")).to_contain_text("cancelled", timeout=10_000)
    playwright.expect(page.locator("#queue tr[data-id]")).to_have_count(0, timeout=10_000)
    playwright.expect(page.locator("#send")).to_have_text("Send")


def test_stop_ends_the_answer_and_the_text_stays(open_page):
    page = open_page(DESKTOP)
    ask(page, LONG)
    answer = page.locator(".message.assistant .answer")
    playwright.expect(answer).to_contain_text("Once upon a time. Once upon a time. Once", timeout=10_000)
    page.click("#send")
    playwright.expect(page.locator(".message.assistant .foot")).to_contain_text("stopped")
    assert len(answer.text_content()) > 40
    playwright.expect(page.locator("#queue tr[data-id]")).to_have_count(0, timeout=10_000)


def test_without_thinking_there_is_no_thought(open_page):
    page = open_page(DESKTOP)
    page.uncheck("#think")
    ask(page, "Say hello.")
    playwright.expect(page.locator(".message.assistant .answer")).to_have_text("Hello from the script.")
    assert page.locator(".message.assistant details").is_hidden()


def test_markup_in_an_answer_is_text(open_page):
    page = open_page(DESKTOP)
    ask(page, "Write <img src=x onerror=alert(1)> markup")
    playwright.expect(page.locator(".message.user").first).to_contain_text("<img src=x")
    assert page.locator(".message img").count() == 0


def test_the_page_asks_for_the_key(scripted):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(scripted.url, timeout=5)
    assert error.value.code == 401 and error.value.headers["www-authenticate"].startswith("Basic")
