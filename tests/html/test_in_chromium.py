"""The page in a real headless browser: no complaints, no requests, nothing cut or overlapping."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autopar.html.page import report_page
from autopar.plan import Plan

from .browser import Browser, CannotStartError, browser, find_chromium
from .plans import HOSTILE, PLAN, SPARSE, TIMELINE, crowded, with_timeline

CHROMIUM = find_chromium()

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium, to test the page in it"
)

WIDE = """
[...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + "." + e.getAttribute("class"))
"""
EMPTY = """
[...document.querySelectorAll(SELECTOR)]
  .filter(e => e.getBoundingClientRect().width <= 0 || e.getBoundingClientRect().height <= 0).length
"""


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    try:
        with browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as opened:
            yield opened
    except CannotStartError as error:
        pytest.skip(str(error))


def show(page_of: Browser, plan: Plan, folder: Path, width: int = 1280) -> Path:
    path = folder / "report.html"
    path.write_text(report_page(plan), encoding="utf-8")
    page_of.resize(width)
    page_of.open(path)
    return path


def count(page_of: Browser, selector: str) -> int:
    return int(page_of.evaluate(f"document.querySelectorAll({selector!r}).length"))


@pytest.mark.parametrize(
    "plan",
    [PLAN, HOSTILE, with_timeline(PLAN, SPARSE)],
    ids=["ordinary", "hostile", "timeline"],
)
@pytest.mark.parametrize("width", [1280, 1024, 800])
def test_no_complaint_no_request_no_overflow(
    page_of: Browser, plan: Plan, width: int, tmp_path: Path
) -> None:
    path = show(page_of, plan, tmp_path, width)
    assert page_of.complaints == []
    assert page_of.requests == [path.as_uri()]
    assert page_of.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page_of.evaluate(WIDE) == []


def test_probes_do_not_run(page_of: Browser, tmp_path: Path) -> None:
    show(page_of, HOSTILE, tmp_path)
    assert page_of.evaluate("typeof window.probed") == "undefined"
    assert count(page_of, "script") == 1 and count(page_of, "img") == 0


def test_an_injected_script_would_be_refused_and_seen(page_of: Browser, tmp_path: Path) -> None:
    """The content policy holds by itself, and the tests above do see what a browser refuses."""
    page = report_page(PLAN).replace(
        "</main>", "</main><script>window.probed = 3</script><img src='https://probe.invalid/x'>"
    )
    path = tmp_path / "injected.html"
    path.write_text(page, encoding="utf-8")
    page_of.open(path)
    assert page_of.evaluate("typeof window.probed") == "undefined"
    assert sum("Content Security Policy" in text for text in page_of.complaints) >= 2
    assert page_of.blocked == ["csp"]


@pytest.mark.parametrize(
    "selector", [".treemap rect", ".scatter circle", ".bar rect", ".chain li", ".span", ".memory"]
)
def test_shapes_can_be_seen(page_of: Browser, selector: str, tmp_path: Path) -> None:
    show(page_of, with_timeline(PLAN, SPARSE), tmp_path)
    assert count(page_of, selector) >= 3
    assert page_of.evaluate(EMPTY.replace("SELECTOR", repr(selector))) == 0


def test_labels_of_the_treemap_stay_in_their_boxes(page_of: Browser, tmp_path: Path) -> None:
    show(page_of, PLAN, tmp_path)
    outside = """
    [...document.querySelectorAll(".treemap text")].filter(text => {
      let box = text.previousElementSibling;
      while (box.tagName !== "rect") box = box.previousElementSibling;
      return text.getBoundingClientRect().right > box.getBoundingClientRect().right + 1;
    }).map(text => text.textContent)
    """
    assert page_of.evaluate(outside) == []


def test_labels_of_the_timeline_stay_in_their_spans(page_of: Browser, tmp_path: Path) -> None:
    show(page_of, with_timeline(PLAN, TIMELINE), tmp_path)
    outside = """
    [...document.querySelectorAll(".timeline .label")].filter(text =>
      text.getBoundingClientRect().right > text.previousElementSibling.getBoundingClientRect().right
    ).map(text => text.textContent)
    """
    assert count(page_of, ".timeline .label") >= 11
    assert page_of.evaluate(outside) == []


def test_labels_of_crowded_candidates_do_not_overlap(page_of: Browser, tmp_path: Path) -> None:
    show(page_of, crowded(), tmp_path)
    overlapping = """
    (() => {
      const shown = [...document.querySelectorAll(".point text:not(.crowded), .limit-label")]
        .map(text => text.getBoundingClientRect());
      const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 &&
        a.top < b.bottom - 4 && b.top < a.bottom - 4;  // boxes of text include the line's height
      return [shown.length, shown.flatMap((a, i) => shown.slice(i + 1).filter(b => meet(a, b))).length];
    })()
    """
    labels, pairs = page_of.evaluate(overlapping)
    assert 6 <= labels < 42 and pairs == 0
    assert count(page_of, ".point") == 41 and count(page_of, ".limit") == 1
    hidden = "getComputedStyle(document.querySelector('.crowded')).visibility"
    assert page_of.evaluate(hidden) == "hidden"
    page_of.evaluate("document.querySelector('.point:has(.crowded)').focus()")
    assert page_of.evaluate(hidden) == "visible"


def test_pointing_and_the_keyboard_tell_the_same(page_of: Browser, tmp_path: Path) -> None:
    show(page_of, PLAN, tmp_path)
    page_of.evaluate("document.querySelector('.point').focus()")
    shown = "document.querySelector('#candidates .tip').textContent"
    assert page_of.evaluate(shown) == "auto dp=2 x tp=4: 12.5 ms, 1.27 MiB (chosen)"
    page_of.evaluate(
        "document.querySelectorAll('.point')[1].dispatchEvent("
        "new PointerEvent('pointerover', {bubbles: true}))"
    )
    assert page_of.evaluate(shown).startswith("data dp=8: 20 ms, 2 MiB (1.60x")


def test_a_link_unfolds_its_block(page_of: Browser, tmp_path: Path) -> None:
    show(page_of, PLAN, tmp_path)
    page_of.evaluate("document.getElementById('block-1').open = false")
    page_of.evaluate("document.querySelector('.chain a[href=\"#block-1\"]').click()")
    page_of.evaluate("new Promise(done => setTimeout(done, 50))")
    assert page_of.evaluate("document.getElementById('block-1').open")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast(page_of: Browser, dark: bool, tmp_path: Path) -> None:
    """At least 4.5 to 1 (WCAG 2.2, criterion 1.4.3) for each kind of text on the page's ground."""
    page_of.dark(dark)
    try:
        show(page_of, PLAN, tmp_path)
        ratios = page_of.evaluate(
            """
            (() => {
              const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
                .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
              const ground = light(getComputedStyle(document.body).backgroundColor);
              return ["body", "a", ".small", ".a0", ".a1", "td", "th", ".quiet", ".absent", "dt"]
                .map(s => document.querySelector(s))
                .map(e => light(getComputedStyle(e).color))
                .map(l => (Math.max(l, ground) + .05) / (Math.min(l, ground) + .05));
            })()
            """
        )
        assert min(ratios) >= 4.5
        brightness = page_of.evaluate(
            "+getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"
        )
        assert (brightness < 60) == dark
    finally:
        page_of.dark(False)
