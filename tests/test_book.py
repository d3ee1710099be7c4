"""The built book, opened in a real headless Chromium: over http, from files, on a phone, in the dark."""

import functools
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests import chromium
from tools import build_book, facts, run_chapters

CHAPTERS = [path.stem for path in run_chapters.chapters()]
PHONE = 390  # pixels, the width of a common phone


@pytest.fixture(scope="session")
def book() -> Path:
    """The folder of the built book, brought up to date."""
    return build_book.build().parent


@pytest.fixture(scope="session")
def address(book: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(book))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def browser(chromium_process: chromium.Chromium) -> Iterator[chromium.Browser]:
    browser = chromium.Browser(chromium_process)
    browser.size(1280, 900)
    yield browser
    browser.close()


@dataclass
class Chapter:
    """A chapter's page in a tab 1280 pixels wide."""

    stem: str
    tab: chromium.Browser


@pytest.fixture(scope="module", params=CHAPTERS)
def chapter(
    request: pytest.FixtureRequest, chromium_process: chromium.Chromium, address: str
) -> Iterator[Chapter]:
    """Opened once for all tests that only read it."""
    tab = chromium.Browser(chromium_process)
    tab.size(1280, 900)
    tab.open(f"{address}/notebooks/{request.param}.html")
    yield Chapter(request.param, tab)
    tab.close()


def pages(book: Path) -> list[str]:
    return sorted(
        path.relative_to(book).as_posix()
        for path in book.rglob("*.html")
        if "_static" not in path.parts
    )


class Targets(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given[key] for key in ("href", "src") if given.get(key)]


@pytest.mark.slow
def test_links_inside_the_book_lead_somewhere(book: Path) -> None:
    parsed = {book / name: Targets((book / name).read_text()) for name in pages(book)}
    for page, targets in parsed.items():
        for link in targets.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), f"{page.relative_to(book)}: {link} leads nowhere"
            if parts.fragment and target in parsed:
                assert unquote(parts.fragment) in parsed[target].anchors, (
                    f"{page.relative_to(book)}: {link}: no such anchor"
                )


@pytest.mark.slow
def test_no_table_is_shown_as_its_source(book: Path) -> None:
    # The book's Markdown in outputs has no tables; dashes outside code become long ones.
    raw = [page for page in pages(book) if "|—|" in (book / page).read_text()]
    assert not raw, f"{raw}: display a DataFrame instead of a Markdown table"


def test_second_build_executes_and_builds_nothing(book: Path, capfd: pytest.CaptureFixture) -> None:
    before = (book / "index.html").stat().st_mtime_ns
    build_book.build()
    assert (book / "index.html").stat().st_mtime_ns == before
    said = capfd.readouterr().out
    assert "up to date" in said and "executing" not in said


def test_the_start_page_has_an_icon_and_leads_to_the_book(book: Path) -> None:
    """Without an icon a browser asks for /favicon.ico, and whether it does so in time is chance."""
    text = (book / "index.html").read_text()
    assert 'rel="icon" href="_static/favicon.svg"' in text and "url=book/intro.html" in text
    assert (book / "_static" / "favicon.svg").is_file()


@pytest.mark.slow
@pytest.mark.browser
def test_no_page_complains_or_asks_the_outside_for_anything(
    browser: chromium.Browser, address: str, book: Path
) -> None:
    for name in pages(book):
        browser.open(f"{address}/{name}")
        outside = [
            url for url in browser.requests if not url.startswith((address, "data:", "blob:"))
        ]
        assert not outside, f"{name} asks for {outside}"
        assert not browser.errors, f"{name}: {browser.errors}"


@pytest.mark.slow
@pytest.mark.browser
def test_no_page_scrolls_sideways_on_a_phone(
    browser: chromium.Browser, address: str, book: Path
) -> None:
    browser.size(PHONE, 844, mobile=True)
    for name in pages(book):
        browser.open(f"{address}/{name}")
        width = browser.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE, f"{name} is {width} pixels wide: {browser.evaluate(WIDE)}"


WIDE = f"[...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > {PHONE}).slice(0, 5).map(e => e.outerHTML.slice(0, 120))"


@pytest.mark.browser
def test_code_fits_a_laptop_without_scrolling(chapter: Chapter) -> None:
    check_code_fits(chapter.tab)


@pytest.mark.browser
def test_code_of_the_page_for_work_fits_a_laptop_too(
    browser: chromium.Browser, address: str
) -> None:
    browser.open(f"{address}/book/at-work.html")
    check_code_fits(browser)


def check_code_fits(tab: chromium.Browser) -> None:
    """At three common widths of laptops; resized, a page is laid out as if it had been opened so."""
    assert tab.evaluate("document.querySelectorAll('.bd-article pre').length")
    try:
        for width in (1024, 1366, 1280):
            tab.size(width, 900)
            assert tab.evaluate("innerWidth") == width
            assert not tab.evaluate(SCROLLED), width
    finally:
        tab.size(1280, 900)


# What no reader has to open, and is wider than its box: the widest line of each.
SCROLLED = """[...document.querySelectorAll('.bd-article pre')]
  .filter(code => !code.closest('details:not([open])') && code.scrollWidth > code.clientWidth + 1)
  .map(code => code.innerText.split('\\n').sort((a, b) => b.length - a.length)[0])"""


@pytest.mark.browser
def test_equations_are_typeset(chapter: Chapter) -> None:
    assert chapter.tab.evaluate("document.querySelectorAll('mjx-container').length") > 5
    assert chapter.tab.evaluate("document.querySelectorAll('mjx-merror').length") == 0
    assert chapter.tab.evaluate(
        "[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))"
    )


@pytest.mark.browser
def test_a_chapter_begins_with_its_picture(chapter: Chapter) -> None:
    """What the set-up prints ("lora-course … is ready.", the profile) is there, in a fold."""
    printed = chapter.tab.evaluate(PRINTED)
    assert any("is ready." in text for text in printed["folded"]), printed
    assert not printed["seen"]


# What cells print above the first figure.
PRINTED = """(() => {
  const figure = document.querySelector('figure.plot, figure.moving');
  const above = [...document.querySelectorAll('.cell_output pre')]
    .filter(e => e.compareDocumentPosition(figure) & Node.DOCUMENT_POSITION_FOLLOWING);
  const folded = above.filter(e => e.closest('details:not([open])'));
  const text = list => list.map(e => e.textContent);
  return {folded: text(folded), seen: text(above.filter(e => !folded.includes(e)))};
})()"""


@pytest.mark.browser
@pytest.mark.parametrize("stem", CHAPTERS)
def test_the_book_opens_from_files(browser: chromium.Browser, book: Path, stem: str) -> None:
    for name in ("book/intro", f"notebooks/{stem}"):
        browser.open((book / f"{name}.html").as_uri())
        assert browser.evaluate("document.querySelector('h1').innerText")
        assert not browser.errors
        assert all(url.startswith(("file:", "data:", "blob:")) for url in browser.requests)
    assert browser.evaluate("document.querySelectorAll('mjx-container').length") > 5


@pytest.mark.browser
@pytest.mark.skipif(
    "1_1_qlora" not in CHAPTERS, reason="the chapter that speaks of quantiles is not there yet"
)
@pytest.mark.parametrize("over", ["http", "file"])
def test_search_finds_quantile(
    browser: chromium.Browser, address: str, book: Path, over: str
) -> None:
    browser.open(f"{address if over == 'http' else book.as_uri()}/search.html?q=quantile")
    browser.wait(
        "document.querySelectorAll('#search-results li a').length > 0 && !!document.querySelector('#search-results .search-summary, #search-results p')"
    )
    browser.wait(
        "[...document.querySelectorAll('#search-results li a')].some(a => a.href.includes('notebooks/1_1_qlora.html'))"
    )
    assert not [url for url in browser.requests if not url.startswith((address, "file:", "data:"))]


@pytest.mark.browser
@pytest.mark.parametrize("stem", CHAPTERS)
def test_solutions_are_folded_and_open_on_a_click(
    browser: chromium.Browser, address: str, stem: str
) -> None:
    browser.open(f"{address}/notebooks/{stem}.html")
    solutions = "[...document.querySelectorAll('.tag_solution details')]"
    count = browser.evaluate(f"{solutions}.length")
    assert count >= 3
    assert browser.evaluate(f"{solutions}.every(e => !e.open)")
    browser.evaluate(f"{solutions}[0].querySelector('summary').click()")
    assert browser.evaluate(
        f"{solutions}[0].open && {solutions}[0].querySelector('pre').getBoundingClientRect().height > 0"
    )


@pytest.mark.browser
def test_dark_mode_follows_the_system_and_the_button(
    browser: chromium.Browser, address: str
) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    theme = "document.documentElement.dataset.theme"
    browser.prefer("dark")
    browser.open(f"{address}/book/intro.html")
    assert browser.evaluate(theme) == "dark"
    dark = browser.evaluate(ground)
    browser.prefer("light")
    browser.open(f"{address}/book/intro.html")
    assert browser.evaluate(theme) == "light" and browser.evaluate(ground) != dark
    for _ in range(3):  # the button goes round: system, light, dark
        browser.evaluate("document.querySelector('.theme-switch-button').click()")
        if browser.evaluate(theme) == "dark":
            break
    assert browser.evaluate(theme) == "dark" and browser.evaluate(ground) == dark


@pytest.mark.browser
def test_launch_and_download_buttons_lead_to_the_chapters_own_notebook(
    chapter: Chapter, address: str, book: Path
) -> None:
    links = chapter.tab.evaluate(
        "[...document.querySelectorAll('.article-header-buttons a')].map(a => a.href)"
    )
    colab = [link for link in links if "colab.research.google.com" in link]
    known = facts.read()
    everywhere = chapter.tab.evaluate("[...document.querySelectorAll('a')].map(a => a.href)")
    own = [link for link in everywhere if known.slug in link or link.startswith(known.book)]
    assert bool(own) == bool(colab) == known.published
    assert all(
        re.fullmatch(
            rf"https://colab\.research\.google\.com/github/[^/]+/[^/]+/blob/main/notebooks/{chapter.stem}\.ipynb",
            link,
        )
        for link in colab
    )
    assert (
        f"{address}/_sources/notebooks/{chapter.stem}.ipynb" in links
        and (book / "_sources" / "notebooks" / f"{chapter.stem}.ipynb").exists()
    )


@pytest.mark.browser
def test_figures_have_alt_text(chapter: Chapter) -> None:
    drawn = chapter.tab.evaluate(
        "[...document.querySelectorAll('figure.plot')].map(f => [...f.querySelectorAll('svg[role=img]')].map(s => s.getAttribute('aria-label')))"
    )
    assert drawn and all(labels and all(label.strip() for label in labels) for labels in drawn)
    images = chapter.tab.evaluate(
        "[...document.querySelectorAll('.cell_output img')].map(i => [i.alt, i.src.length])"
    )
    assert all(alt.strip() and "_images" not in alt for alt, _ in images)


LETTERS = """[...document.querySelectorAll('figure.plot > div')].filter(e => e.offsetHeight).map(e => {
    const svg = e.querySelector('svg'), scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    return scale * 72 / 100 })"""  # 1 is the size at which 11 points are 15 pixels


@pytest.mark.browser
@pytest.mark.parametrize("stem", CHAPTERS)
def test_letters_in_figures_are_readable_on_a_phone(
    browser: chromium.Browser, address: str, stem: str
) -> None:
    browser.size(PHONE, 844, mobile=True)
    browser.open(f"{address}/notebooks/{stem}.html")
    assert min(browser.evaluate(LETTERS)) > 0.7  # 11 pixels for 11 points


INK = "[...document.querySelectorAll('figure.plot svg, figure.moving')].map(e => getComputedStyle(e).color)"


@pytest.mark.browser
@pytest.mark.parametrize("stem", CHAPTERS)
def test_figures_are_drawn_in_the_colour_of_the_page_s_text(
    browser: chromium.Browser, address: str, stem: str
) -> None:
    light = {}
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.open(f"{address}/notebooks/{stem}.html")
        inks = {
            sum(map(int, re.findall(r"\d+", ink)[:3])) / 3 for ink in browser.evaluate(INK) if ink
        }
        light[scheme] = inks
    assert max(light["light"]) < 100 and min(light["dark"]) > 150


MOVED = (
    "[...document.querySelectorAll('figure.moving')].map(f => f.querySelector('.panels').innerHTML)"
)


@pytest.mark.browser
@pytest.mark.parametrize("stem", CHAPTERS)
@pytest.mark.parametrize("over", ["http", "file"])
def test_figures_that_move_do_so_in_the_page(
    browser: chromium.Browser, address: str, book: Path, stem: str, over: str
) -> None:
    browser.open(f"{address if over == 'http' else book.as_uri()}/notebooks/{stem}.html")
    before = browser.evaluate(MOVED)
    browser.evaluate(
        """document.querySelectorAll('figure.moving').forEach(f => {
            const control = f.querySelector('[data-control]');
            control.value = control.value === '0' ? 1 : 0;
            control.dispatchEvent(new Event('input', {bubbles: true})) })"""
    )
    after = browser.evaluate(MOVED)
    assert all(len(old) > 200 and old != new for old, new in zip(before, after))
    assert not browser.errors


@pytest.mark.browser
def test_a_link_to_a_claim_opens_it_in_the_ledger_and_the_filter_counts(
    browser: chromium.Browser, address: str, book: Path
) -> None:
    page = (book / "book" / "ledger.html").read_text()
    name = re.search(r'id="(claim-[\w-]+)"', page)[1]
    browser.open(f"{address}/book/ledger.html#{name}")
    assert browser.evaluate(f"document.getElementById('{name}').closest('details').open")
    seen = "[...document.querySelectorAll('details.claim')].filter(e => e.offsetHeight).length"
    everything = browser.evaluate(seen)
    for value in ("verdict-fails", "verdict-holds"):
        browser.evaluate(
            f"(s => {{ s.value = '{value}'; s.dispatchEvent(new Event('input', {{bubbles: true}})) }})(document.querySelectorAll('#ledger-filter select')[1])"
        )
        assert browser.evaluate(seen) == page.count(f"{value} ")
    assert everything == page.count("verdict-fails ") + page.count("verdict-holds ") > 2
    assert browser.evaluate("document.querySelector('#ledger-filter [role=status]').textContent")


@pytest.mark.browser
def test_a_link_to_a_claim_unfolds_the_chapters_table_and_paper_shows_it(
    browser: chromium.Browser, address: str
) -> None:
    browser.open(f"{address}/notebooks/{CHAPTERS[0]}.html")
    shown = "document.querySelector('details.claims tr[id]').checkVisibility({contentVisibilityAuto: true})"
    assert not browser.evaluate(shown)
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.wait(shown)
    browser.call("Emulation.setEmulatedMedia", media="screen")
    browser.wait(f"!{shown}")
    browser.evaluate("document.querySelector('.claims.answers a[href^=\"#claim-\"]').click()")
    browser.wait(shown)


@pytest.mark.browser
@pytest.mark.parametrize("query", ["持续", "蒸馏"])
def test_search_finds_parts_of_chinese_terms(
    browser: chromium.Browser, address: str, query: str
) -> None:
    browser.open(f"{address}/search.html?q={query}")
    browser.wait("document.querySelectorAll('#search-results li a').length > 0")
    assert "glossary" in browser.evaluate("document.querySelector('#search-results').innerHTML")


@pytest.mark.browser
def test_search_puts_the_chapter_before_the_api(browser: chromium.Browser, address: str) -> None:
    browser.open(f"{address}/search.html?q=balance_loss")
    found = "[...document.querySelectorAll('#search-results li a')].map(a => a.href)"
    browser.wait(f"{found}.some(a => a.includes('_api'))")
    assert "notebooks/2_1_experts" in browser.evaluate(found)[0]


@pytest.mark.browser
def test_a_page_describes_itself_and_opens_on_kaggle(chapter: Chapter) -> None:
    described = chapter.tab.evaluate(
        """['meta[name=description]', 'meta[property="og:title"]', 'meta[property="og:description"]']
           .map(name => document.querySelector(name)?.content)"""
    )
    assert all(text and "<" not in text for text in described) and len(described[0]) > 60
    links = chapter.tab.evaluate(
        "[...document.querySelectorAll('.article-header-buttons a')].map(a => a.href)"
    )
    kaggle = [link for link in links if "kaggle.com" in link]
    assert bool(kaggle) == facts.read().published
    assert all(link.endswith(f"{chapter.stem}.ipynb") for link in kaggle)


@pytest.mark.slow
def test_no_table_header_is_empty(book: Path) -> None:
    empty = [
        page for page in pages(book) if re.search(r"<th[^>]*>\s*</th>", (book / page).read_text())
    ]
    assert not empty, empty


@pytest.mark.browser
def test_long_lines_of_code_wrap_on_paper(browser: chromium.Browser, address: str) -> None:
    browser.open(f"{address}/notebooks/{CHAPTERS[0]}.html")
    browser.call("Emulation.setEmulatedMedia", media="print")
    wrapped = "[...document.querySelectorAll('.bd-article pre')].every(e => getComputedStyle(e).whiteSpace === 'pre-wrap')"
    assert browser.evaluate(wrapped)


@pytest.mark.browser
def test_a_chapter_plays_a_step_where_it_links_to_one(
    browser: chromium.Browser, book: Path
) -> None:
    browser.open((book / "notebooks" / "2_1_experts.html").as_uri())
    loaded = [address for address in browser.requests if "/_static/play/" in address]
    assert [address.rsplit("/", 1)[1] for address in loaded] == ["embed.js"]
    browser.evaluate("document.querySelector('.play-here > button').click()")
    browser.wait("document.querySelector('.play-here .play-card .play-score strong')")
    assert browser.evaluate("document.querySelectorAll('.play-here .play-gated').length") > 20
    assert not browser.errors


@pytest.mark.browser
def test_the_chapter_on_distillation_holds_the_teachers(
    browser: chromium.Browser, book: Path
) -> None:
    browser.open((book / "notebooks" / "3_2_distillation.html").as_uri())
    browser.evaluate("document.querySelector('.play-here > button').click()")
    rows = "document.querySelectorAll('.play-here [data-try=teachers] tbody tr').length"
    browser.wait(f"{rows} > 5")
    assert browser.evaluate("document.activeElement.name") == "text"
    assert not browser.errors
