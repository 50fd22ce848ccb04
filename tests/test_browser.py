"""The report in a real browser, headless: the verdict is on the first screen, nothing is fetched, nothing overflows a
phone, the keyboard is enough, axe-core finds nothing.
"""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest

from silalib.analysis import plots
from silalib.experiments import EXHIBITS
from silalib.files import ROOT
from silalib.report import pages

REPORTS = sorted(ROOT.glob("results/*/report"))
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PHONE, DESK = (390, 844), (1280, 900)

EVERYTHING = """# A page with everything

Text with $e^{z_c}$ and a [link](09_claims.ipynb).

## A formula that is wide, and a long_name_that_has_no_place_to_break_in_all_of_its_many_many_letters_of_text

$$L = FORMULA$$
""".replace("FORMULA", " + ".join(20 * ["\\sum_{c=1}^{C} z_c"]))  # wide in any font


@pytest.fixture(scope="module")
def browser():
    """A selenium driver of Chromium that logs all requests and the console."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chromedriver")]
    if not (any(found[:3]) and found[3]) and "SILALIB_NEEDS_BROWSER" not in os.environ:
        pytest.skip("no Chromium with its chromedriver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install -e '.[dev]'")

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, found[:3]))
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[3]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def new_pages(tmp_path_factory):
    """The folder of a report made now: one page with a wide table, a wide figure, math and code; the rest not built."""
    import matplotlib.pyplot as plt
    import pandas as pd
    from IPython.core.formatters import DisplayFormatter
    from nbformat import v4

    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SILALIB_RESULTS", str(tmp_path_factory.mktemp("results")))
        patch.setattr("IPython.display.display", shown.append)
        fig, ax = plt.subplots(figsize=(12, 4))
        ax.plot([1, 2, 3])
        plots.show(fig, "wide", "small", alt="A rising line")
        fig, axes = plt.subplots(1, 2, figsize=(11, 4))
        for ax in axes:
            ax.plot([1, 2, 3])
        plots.show(fig, "panels", "small", alt="Two rising lines")
        rows = [["0.5", "70.1", "100.0"], ["1.0", "71.2", "50.0"], ["2.0", "72.3", "0.0"]]
        budgets = pd.DataFrame(rows, columns=["cost", "SiLa", "exit 1 (%)"])
        plots.show_table(budgets, "fig4_budget", "small", "Budgets")
        wide = pd.DataFrame({f"a header of several words {i}": [f"{i}.{i} ± 0.1"] * 3 for i in range(12)})
        plots.show_table(wide, "wide", "small", "A wide table")
        rendered = [DisplayFormatter().format(item) for item in shown]
        outputs = [v4.new_output("display_data", data, metadata=metadata) for data, metadata in rendered]
        code = v4.new_code_cell("def f(x):  # a comment\n    return 'text', 1.5", outputs=outputs, execution_count=1)
        notebook = v4.new_notebook(cells=[v4.new_markdown_cell(EVERYTHING), code])
        report = pages.Report("small", exhibits=dict(EXHIBITS))
        report.folder.mkdir()
        page = report.notebook_page("00_siamese_labels", notebook)
        (report.folder / "00_siamese_labels.html").write_text(page, encoding="utf-8")
        with mock.patch.dict(EXHIBITS, clear=True):  # none has a record: nothing is judged
            report.write_index()
    return report.folder


def visit(browser, page, size=DESK, **media):
    """Load a page in a window of that size, with CSS media features such as prefers_color_scheme="dark"."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size is PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items() if name != "media"]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media.get("media", ""), "features": features})
    browser.get(page.resolve().as_uri())


def check(browser, page):
    """What must hold of every page: it loads by itself, without an error, and fits a phone."""
    visit(browser, page, PHONE)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert page.resolve().as_uri() in asked
    assert [url[:80] for url in asked if not url.startswith(("data:", page.resolve().as_uri()))] == []
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    width = browser.execute_script("return document.scrollingElement.scrollWidth")
    assert width <= PHONE[0], f"{page} is {width} pixels wide"
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0


@pytest.mark.parametrize("folder", REPORTS, ids=lambda folder: folder.parent.name)
def test_every_committed_page_fetches_nothing_and_fits_a_phone(browser, folder):
    for page in sorted(folder.glob("*.html")):
        check(browser, page)


def test_every_new_page_fetches_nothing_and_fits_a_phone(browser, new_pages):
    made = sorted(new_pages.glob("*.html"))
    assert len(made) == len(pages.Report("small").notebooks) + 1
    for page in made:
        check(browser, page)


def test_what_is_wide_scrolls_in_its_own_box(browser, new_pages):
    visit(browser, new_pages / "00_siamese_labels.html", PHONE)
    box = "const e = document.querySelector(arguments[0]); return [e.scrollWidth > e.clientWidth, e.clientWidth]"
    for part in (".scroll:has(#T_wide)", ".math"):
        scrolls, width = browser.execute_script(box, part)
        assert scrolls and width <= PHONE[0], part


WINDOWS = """
const rect = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const shown = [...document.querySelectorAll("figure svg")].map(rect).filter(([l, t, r, b]) => r > l + 1 && b > t + 1);
return shown;
"""


def test_figures_fit_a_phone_and_their_panels_stack(browser, new_pages):
    """One panel is one drawing; two are one drawing on a desk, and two windows on it, one below the other, here."""
    visit(browser, new_pages / "00_siamese_labels.html", PHONE)
    whole, first, second = browser.execute_script(WINDOWS)
    assert all(left >= 0 and right <= PHONE[0] for left, _, right, _ in (whole, first, second))
    assert second[1] >= first[3] and first[2] - first[0] > 0.7 * PHONE[0]
    visit(browser, new_pages / "00_siamese_labels.html")
    assert len(browser.execute_script(WINDOWS)) == 2


def test_the_first_column_of_a_table_sticks(browser, new_pages):
    visit(browser, new_pages / "00_siamese_labels.html", PHONE)
    place = "const c = document.querySelector('#T_wide tbody th').getBoundingClientRect(); return [c.left, c.right]"
    scroll = "document.querySelector('.scroll:has(#T_wide)').scrollLeft = 400"
    before = browser.execute_script(place)
    browser.execute_script(scroll)
    assert browser.execute_script(place) == before and before[0] >= 0


def test_the_slider_shows_a_row_of_the_table_of_budgets(browser, new_pages):
    """It begins in the middle, and the arrow keys move it; the table stays below."""
    from selenium.webdriver.common.keys import Keys

    visit(browser, new_pages / "00_siamese_labels.html", PHONE)
    slider = browser.find_element("id", "budget")
    shown = "return [...document.querySelectorAll('.budget dt, .budget dd:not(.bar)')].map(e => e.textContent)"
    assert browser.execute_script(shown) == ["cost", "1.0", "SiLa", "71.2", "exit 1 (%)", "50.0"]
    slider.send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script(shown)[1::2] == ["2.0", "72.3", "0.0"]
    assert slider.get_attribute("aria-valuetext") == "cost 2.0, SiLa 72.3, exit 1 (%) 0.0"
    assert browser.find_element("id", "T_fig4_budget").is_displayed()
    assert browser.execute_script("return document.querySelector('main > .budget') !== null")  # the text's width


AXE = """
const done = arguments[0];
for (const details of document.querySelectorAll("details")) details.open = true;
axe.run().then((r) => done(r.violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html.slice(0, 100))}`)));
"""


@pytest.fixture(scope="module")
def axe():
    """The source of axe-core, as the package axe-core-python brings it."""
    found = importlib.util.find_spec("axe_core_python")
    if not found:
        pytest.skip("no axe-core: pip install -e '.[dev]'")
    return (Path(found.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")


def findings(browser, axe, page):
    found = []
    for size, scheme in ((PHONE, "light"), (DESK, "dark")):
        visit(browser, page, size, prefers_color_scheme=scheme)
        browser.execute_script(axe)
        found += browser.execute_async_script(AXE)
    return found


def test_axe_finds_nothing_on_new_pages(browser, new_pages, axe):
    for page in ("00_siamese_labels.html", "01_table1_cifar100.html", "index.html"):
        assert findings(browser, axe, new_pages / page) == []


FIRST_SCREEN = """
const height = arguments[0];
const bold = [...document.querySelectorAll("main > p:not(.beside) > strong")].map((e) => e.parentElement);
return bold.filter((e) => e.getBoundingClientRect().bottom <= height).map((e) => e.textContent);
"""
WITHOUT_NUMBER = """
return [...document.querySelectorAll(".scroll")].filter((box) => {
  const right = box.getBoundingClientRect().right;
  const seen = [...box.querySelectorAll("tbody > tr > *")].filter((c) => c.getBoundingClientRect().right <= right);
  return !seen.some((cell) => /\\d|not run/.test(cell.textContent));
}).map((box) => box.getAttribute("aria-label"));
"""
VERDICT = "reproduced|negligible|contradicted|undecided|so far|no verdict|[Nn]ot judged|judges nothing|not run"
VERDICT += "|[Dd]emonstration"  # page 14


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder",
    [pytest.param(f, marks=pytest.mark.long) if f.parent.name == "paper" else f for f in REPORTS],
    ids=lambda folder: folder.parent.name,
)
def test_every_committed_page_answers_on_its_first_screen(browser, axe, folder):
    """The verdict, with a number where there are records; no table without one; and axe-core finds nothing."""
    for page in sorted(folder.glob("[0-9]*.html")):
        for size in (PHONE, DESK):
            visit(browser, page, size)
            shown = " ".join(browser.execute_script(FIRST_SCREEN, size[1]))
            assert re.search(VERDICT, shown) and (re.search(r"\d", shown) or "not run" in shown), page
            assert browser.execute_script(WITHOUT_NUMBER) == [], page
    for page in sorted(folder.glob("*.html")) if folder.parent.name != "quick" else ():  # its pages are no others
        assert findings(browser, axe, page) == [], page


def test_the_keyboard_is_enough(browser, new_pages):
    """Tab reaches the skip link first, Enter follows it; Tab reaches folded code, Enter unfolds and folds it."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    press = lambda key: ActionChains(browser).send_keys(key).perform()
    ask = browser.execute_script
    visit(browser, new_pages / "00_siamese_labels.html")
    press(Keys.TAB)
    assert ask("return document.activeElement.className") == "skip"
    assert ask("return document.activeElement.getBoundingClientRect().left >= 0")
    press(Keys.ENTER)
    assert ask("return location.hash") == "#content"
    for _ in range(20):
        press(Keys.TAB)
        if ask("return document.activeElement.tagName") == "SUMMARY":
            break
    assert ask("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    is_open = "return document.activeElement.parentElement.open"
    assert not ask(is_open)
    press(Keys.ENTER)
    assert ask(is_open)
    press(Keys.ENTER)
    assert not ask(is_open)


CONTRAST = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (c) => {
  const [r, g, b] = c.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const low = [];
for (const details of document.querySelectorAll("details")) details.open = true;
for (const e of document.body.querySelectorAll("*:not(.anchor)")) {
  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
  let behind = e;
  while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const pair = [rgb(getComputedStyle(e).color), rgb(getComputedStyle(behind || document.body).backgroundColor)];
  const [dark, bright] = pair.map(light).sort((a, b) => a - b);
  const ratio = (bright + 0.05) / (dark + 0.05);
  if (ratio < 4.5) low.push(`${e.tagName} ${e.className}: ${ratio.toFixed(2)}`);
}
return [low, light(rgb(getComputedStyle(document.body).backgroundColor))];
"""
"""Elements whose text has less than WCAG's contrast of 4.5 to what is behind it, and the page's own luminance."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser, new_pages, scheme):
    for page in ("00_siamese_labels.html", "01_table1_cifar100.html", "index.html"):
        visit(browser, new_pages / page, prefers_color_scheme=scheme)
        low, background = browser.execute_script(CONTRAST)
        assert low == []
        assert background > 0.9 if scheme == "light" else background < 0.05


def test_print_leaves_out_navigation_and_code(browser, new_pages):
    visit(browser, new_pages / "00_siamese_labels.html", media="print", prefers_color_scheme="dark")
    seen = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).length"
    for part in ("nav", ".skip", "details", ".anchor"):
        assert browser.execute_script(seen, part) == 0, part
    assert browser.execute_script(seen, "h1, table, figure > svg") == 5
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
