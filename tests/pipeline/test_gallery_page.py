"""The page of a gallery in Chromium, as people see it: clicked, sorted, searched, and attacked."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.gallery import gallery as module
from pipeline.gallery.gallery import Gallery, Piece, ShownCaption, ShownPhoto
from pipeline.gallery.page import page_of
from tests.conftest import write_photo

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

MARKUP = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
DESKTOP, PHONE = (1440, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, steered by its own driver: Selenium is given both and downloads nothing."""
    from selenium.webdriver.chrome.service import Service

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--disable-background-networking", "--hide-scrollbars", "--force-device-scale-factor=1"),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield started
    finally:
        started.quit()


class Page:
    """A page in the browser, at the width of a desktop unless it is resized."""

    def __init__(self, browser: Any, file: Path) -> None:
        self.browser = browser
        self.resize(DESKTOP)
        browser.get_log("browser")
        browser.get(file.as_uri())

    def resize(self, size: tuple[int, int], *, dark: bool = False) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def js(self, code: str, *arguments: object) -> Any:
        return self.browser.execute_script(f"return {code}", *arguments)

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        found = self.js(
            "[...document.querySelectorAll(arguments[0])].map(e => e.textContent.toWellFormed())",
            selector,
        )
        assert isinstance(found, list)
        return found

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for what the page does in its own time."""
        for _ in range(200):
            if condition():
                return
            time.sleep(0.025)
        raise AssertionError("the page does not get there")

    def choose(self, select: str, label: str) -> None:
        options = self.texts(f"{select} option")
        place = next(i for i, text in enumerate(options) if text.startswith(label))
        self.find(f"{select} option:nth-child({place + 1})").click()

    def press(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def names(self) -> list[str]:
        return self.texts(".meta bdi")

    def loaded(self, selector: str = ".card img") -> bool:
        return bool(
            self.js(
                "[...document.querySelectorAll(arguments[0])].every("
                "i => i.complete && i.naturalWidth > 0)",
                selector,
            )
        )


def caption(text: str, *probabilities: float) -> ShownCaption:
    words = text.split()
    pieces = [
        Piece(f" {word}" if place else word, probability)
        for place, (word, probability) in enumerate(
            zip(words, probabilities or [0.9] * len(words), strict=True)
        )
    ]
    shares = [piece.probability or 1.0 for piece in pieces]
    return ShownCaption((*pieces, Piece(".")), sum(shares) / len(shares))


SHOWN = (
    ShownPhoto(
        "trip/dog.jpg",
        (caption("A dog runs", 0.9, 0.6, 0.04), caption("The dog sits"), caption("A puppy")),
        references=("A brown dog is running .", "A dog."),
        cider=61.3,
    ),
    ShownPhoto("trip/cats.jpg", (caption("Two cats", 0.9, 0.9),), cider=120.0),
    ShownPhoto("trip/none.jpg", error="the file is empty"),
    ShownPhoto("trip/sea.jpg", (caption("A boat at sea", 0.2, 0.3, 0.2, 0.3),), cider=0.0),
)


def written(folder: Path, shown: tuple[ShownPhoto, ...], title: str = "A trip") -> Path:
    with Gallery(folder / "gallery") as gallery:
        for seed, photo in enumerate(shown):
            write_photo(folder / f"{seed}.jpg", seed, (120, 90))
            gallery.add(photo, None if photo.error else folder / f"{seed}.jpg")
        gallery.finish(title, ["CIDEr 60.4"])
    return folder / "gallery" / "index.html"


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Page:
    return Page(browser, written(tmp_path, SHOWN))


@pytest.mark.parametrize("inside", [True, False])
def test_photos_are_shown_from_the_page_and_from_beside_it(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    if not inside:
        monkeypatch.setattr(module, "_INSIDE_BYTES", 0)
    file = written(tmp_path, SHOWN)
    assert (file.parent / "thumbnails-1").exists() is not inside
    if inside:  # one file to send
        file = file.rename(tmp_path / "sent.html")
    page = Page(browser, file)
    page.until(page.loaded)
    assert len(page.texts(".card img")) == 3
    assert page.texts("h1, #facts span") == ["A trip", "CIDEr 60.4"]
    assert page.texts(".photo span") == ["the file is empty"]
    assert browser.get_log("browser") == []


def test_photos_are_sorted_filtered_and_searched(page: Page) -> None:
    assert page.names() == ["dog.jpg", "cats.jpg", "none.jpg", "sea.jpg"]
    page.choose("#sort", "Least sure")
    assert page.names() == ["sea.jpg", "dog.jpg", "cats.jpg", "none.jpg"]
    page.choose("#sort", "Highest CIDEr")
    assert page.names() == ["cats.jpg", "dog.jpg", "sea.jpg", "none.jpg"]
    page.choose("#sort", "By file name")
    assert page.names() == ["cats.jpg", "dog.jpg", "none.jpg", "sea.jpg"]
    assert page.texts("#show option") == [
        *("All photos", "Captioned (3)", "Set aside (1)", "With a word below 5 % (1)"),
        *("CIDEr below 20 (1)", "CIDEr 100 or more (1)"),
    ]
    page.choose("#show", "CIDEr below")
    assert page.names() == ["sea.jpg"]
    page.choose("#show", "All")
    for words, names in (
        ("DOG brown", ["dog.jpg"]),  # in a caption and in a reference
        ("cat", ["cats.jpg"]),  # begins the word
        ("ats", []),
        ("none.jpg", ["none.jpg"]),
    ):
        page.find("#search").clear()
        page.find("#search").send_keys(words)
        page.until(lambda names=names: page.names() == names)  # type: ignore[misc]
    page.find("#search").clear()
    page.find("#search").send_keys("ats")
    page.until(lambda: page.find("#count").text == "0 of 4")
    page.find("#reset").click()
    assert page.find("#count").text == "4 photos"


def test_unsure_words_are_marked_and_the_marks_go_away(page: Page) -> None:
    assert page.texts(".card:first-child .u3") == ["runs"]
    line = "getComputedStyle(document.querySelector('.u3')).textDecorationLine"
    assert page.js(line) == "underline"
    page.find("#confidence").click()
    assert page.js(line) == "none"


def test_a_photo_opens_with_its_other_captions_and_references(page: Page) -> None:
    page.find(".card .photo").click()
    assert page.texts("#detail-caption .word > span") == ["A", "dog", "runs"]
    assert page.texts("#detail-caption small") == ["90", "60", "4"]
    assert page.texts("#story ol li") == ["The dog sits. 90 %", "A puppy. 90 %"]
    assert page.texts("#story ul li") == ["A brown dog is running .", "A dog."]
    assert page.texts("#story dt") == ["Confidence", "CIDEr", "File"]
    assert page.texts("#story dd")[1:] == ["61.3", "dog.jpg"]
    page.until(lambda: page.loaded("#stage img"))
    page.find("#next").click()
    page.find("#next").click()
    assert page.texts("#place, #stage p, #story h2") == [
        *("3 of 4", "the file is empty", "No caption"),
    ]
    page.find("#close").click()
    assert not page.find("#detail").is_displayed()


def test_the_keyboard_is_enough(page: Page) -> None:
    keys = webdriver.Keys
    name = "document.activeElement.closest('.card').querySelector('bdi').textContent"
    page.press(keys.ARROW_RIGHT)  # into the grid
    page.press(keys.ARROW_RIGHT)
    assert page.js(name) == "cats.jpg"
    page.press(keys.END)
    assert page.js(name) == "sea.jpg"
    page.press(keys.ENTER)
    assert page.texts("#place") == ["4 of 4"]
    page.press(keys.ARROW_LEFT)
    page.press(keys.ARROW_LEFT)
    assert page.texts("#place") == ["2 of 4"]
    page.press(keys.ESCAPE)
    page.until(lambda: not page.find("#detail").is_displayed())
    assert page.js(name) == "cats.jpg"  # where one was
    page.press("/")
    page.press("boat")
    page.until(lambda: page.names() == ["sea.jpg"])
    page.press(keys.ARROW_DOWN)
    assert page.js(name) == "sea.jpg"


def test_markup_from_files_is_text(browser: Any, tmp_path: Path) -> None:
    odd = f"{MARKUP} <!-- \u2028\u2029 & &lt; @DATA@ \udcff"
    hostile = ShownPhoto(
        f"x/{odd}",
        (ShownCaption((Piece(odd, 0.01),), 0.5), ShownCaption((Piece(odd),))),
        references=(odd,),
    )
    plain = ShownPhoto("x/plain.jpg", (caption("A dog"),))
    page = Page(browser, written(tmp_path, (plain, hostile, ShownPhoto("x/y", error=odd)), odd))
    shown = odd.replace("\udcff", "\ufffd")
    assert page.js("document.scripts.length") == 2
    assert len(page.texts(".card img")) == 2
    assert page.texts("h1") == [shown]
    assert page.names()[1] == shown
    assert page.texts(".caption")[1] == shown
    assert page.texts(".photo span") == [shown]
    page.js("document.querySelector('.card:nth-child(2) .photo').click()")  # the driver wants UTF-8
    assert page.texts("#story ol li, #story ul li, #story dd bdi") == [shown] * 3
    assert page.js("window.hacked") is None
    assert browser.get_log("browser") == []


def test_the_policy_forbids_everything_else(page: Page) -> None:
    page.js("document.addEventListener('securitypolicyviolation', "
            "e => (window.violated ||= []).push(e.effectiveDirective))")  # fmt: skip
    for attempt in (
        "const s = document.createElement('style'); s.textContent = '*{}'; document.head.append(s)",
        "const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i)",
        "fetch('http://127.0.0.1:9/').catch(() => 0)",
        "const f = document.createElement('iframe'); f.src = 'http://127.0.0.1:9/'; "
        "document.body.append(f)",
        "const s = document.createElement('script'); s.append('window.hacked = 1'); "
        "document.body.append(s)",
        "try { document.body.setAttribute('onclick', 'window.hacked = 1') } catch {}; "
        "document.body.click()",
        "try { document.body.innerHTML = '<p>' } catch { window.refused = true }",
        "const b = document.createElement('base'); b.href = 'http://x/'; document.head.append(b)",
    ):
        page.browser.execute_script(attempt)
    expected = {
        *("style-src-elem", "img-src", "connect-src", "frame-src", "base-uri"),
        "require-trusted-types-for",
    }
    page.until(lambda: set(page.js("window.violated || []")) >= expected)
    assert set(page.js("window.violated")) == expected
    assert page.js("window.hacked") is None
    assert page.js("window.refused") is True


def test_a_script_that_is_not_the_pages_own_does_not_run(browser: Any, tmp_path: Path) -> None:
    file = written(tmp_path, SHOWN)
    text = file.read_text(encoding="utf-8")
    added = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'></body>"
    file.write_text(text.replace("</body>", added), encoding="utf-8")
    page = Page(browser, file)
    assert page.js("document.scripts.length") == 3
    assert page.js("window.hacked") is None
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert sum("violates the following Content Security Policy" in each for each in refused) == 2


def test_it_fits_a_phone_and_the_dark(page: Page) -> None:
    overflow = "document.scrollingElement.scrollWidth - document.documentElement.clientWidth"
    cards = "[...document.querySelectorAll('.card')]"
    left = f"new Set({cards}.map(c => c.getBoundingClientRect().left)).size"
    paper = "getComputedStyle(document.body).backgroundColor"
    assert (page.js(overflow), page.js(left)) == (0, 4)
    light = page.js(paper)
    page.resize(PHONE, dark=True)
    page.until(lambda: page.js(left) == 1)
    assert page.js(overflow) == 0
    assert page.js(paper) != light
    page.find(".card .photo").click()
    box = page.js("document.getElementById('detail').getBoundingClientRect().toJSON()")
    assert (box["width"], box["height"]) == PHONE
    assert page.js(overflow) == 0


def test_of_very_many_photos_only_those_in_view_are_in_the_document(
    browser: Any, tmp_path: Path
) -> None:
    photos = [
        {"name": f"{i}.jpg", "captions": [{"pieces": [[f"number {i}", i / 5000]], "confidence": 1}]}
        for i in range(5000)
    ]
    data = {"title": "Many", "facts": [], "thumbnails": "thumbnails-1", "photos": photos}
    (tmp_path / "many.html").write_text(page_of(data), encoding="utf-8")
    page = Page(browser, tmp_path / "many.html")
    assert 0 < len(page.names()) < 60
    page.js("scrollTo(0, document.body.scrollHeight)")
    page.until(lambda: page.names()[-1:] == ["4999.jpg"])
    assert len(page.names()) < 60
    page.find("#search").send_keys("4321")
    page.until(lambda: page.names() == ["4321.jpg"])
    assert page.find(".card .caption").is_displayed()


def test_captions_of_other_scripts_are_written_their_way(browser: Any, tmp_path: Path) -> None:
    hebrew = ShownPhoto("x/1", (ShownCaption((Piece("כלב", 0.9), Piece(" רץ", 0.1), Piece("."))),))
    chinese = ShownPhoto(
        "x/2",
        (ShownCaption(tuple(Piece(letter, 0.01) for letter in "一只狗在跑。")),),
    )
    page = Page(browser, written(tmp_path, (hebrew, chinese)))
    directions = (
        "[...document.querySelectorAll('.caption')].map(c => getComputedStyle(c).direction)"
    )
    assert page.js(directions) == ["rtl", "ltr"]
    assert page.texts(".caption") == ["כלב רץ.", "一只狗在跑。"]
    page.find("#search").send_keys("狗")
    page.until(lambda: page.names() == ["2"])
