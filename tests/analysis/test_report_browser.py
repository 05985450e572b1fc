"""The pages in a real browser, from disk, narrow and wide, light and dark."""

import shutil

import pytest

from mvit_jax.analysis import report
from tests.support import pages

pytestmark = pytest.mark.browser

SIZES = [(375, 800), (1440, 900)]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")  # else Playwright's own
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    names = [f"a class with a long name, number {i}" for i in range(400)]
    confusion = [[int(i == j) for j in range(400)] for i in range(400)]
    many = pages.evaluation(classes=names, confusion=confusion, per_class=[100.0] * 400)
    long = pages.run(folder="/a/very/" + "long_name_without_a_break" * 8)
    written = {
        "report": report.report(pages.run()),
        "untested": report.report(pages.run(evaluations=[], sheet=None)),
        "many": report.report(pages.run(evaluations=[many], folder=long.folder)),
        "comparison": report.comparison([pages.run(folder=f"/x/{i}" * 5) for i in range(7)]),
    }
    for name, html in written.items():
        (folder / f"{name}.html").write_text(html)
    return folder


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["report", "untested", "many", "comparison"])
def test_a_page_opens_from_disk_offline_and_fits_the_window(browser, files, name, size):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    url = (files / f"{name}.html").as_uri()
    page.goto(url)
    assert [r for r in requests if not r.startswith("data:")] == [url]
    assert messages == []
    assert page.title() != "x"  # which an injected class name would set
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == size[0]
    sizes = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert all(n > 0 for n in sizes) and len(sizes) == (6 if name in ("report", "many") else 0)
    # Letters of figures can be read, on a telephone too.
    script = (
        "[...document.querySelectorAll('svg text')].map(t => { const m = t.getScreenCTM(); "
        "return parseFloat(getComputedStyle(t).fontSize) * Math.hypot(m.a, m.b) })"
    )
    assert min(page.evaluate(script), default=9) > 7.5


def test_light_and_dark_schemes_have_contrast(browser, files):
    brightness = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto((files / "report.html").as_uri())
        for part, selector, key in (
            ("paper", "body", "backgroundColor"),
            ("ink", "h1", "color"),
            ("figure", "svg text", "fill"),
        ):
            script = f"getComputedStyle(document.querySelector('{selector}')).{key}"
            colour = page.evaluate(script).removeprefix("rgb(").removesuffix(")")
            brightness[scheme, part] = sum(int(c) for c in colour.split(",")) / 3
    assert brightness["light", "paper"] > 240 and brightness["dark", "paper"] < 40
    for part in ("ink", "figure"):
        assert brightness["light", part] < 60 and brightness["dark", part] > 180


def test_the_page_needs_no_javascript(browser, files):
    page = browser.new_page(java_script_enabled=False)
    page.goto((files / "report.html").as_uri())
    assert page.locator("details").first.get_attribute("open") is None
    page.locator("summary").first.click()
    assert page.locator("details").first.get_attribute("open") is not None
