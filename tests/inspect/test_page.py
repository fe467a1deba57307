"""The page of `gircse inspect --html`: its markup, its colours, and what a real browser makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from gircse.inspect.failures import diagnose
from gircse.inspect.page import inspection_page
from gircse.inspect.page_style import PALETTES
from gircse.inspect.soft_tokens import SoftToken, TextInspection

ATTACK = """</p><script>document.documentElement.dataset.owned = "1"</script><img src=x onerror=alert(1)> & "q" 'q'"""
TEXTS = [ATTACK, "שלום \u202eevil\u202c مرحبا", "👩‍👩‍👧 \x00\x1b[31m\x07 \ud800 control", "plain\n\n  text"]
TOKENS = [" the", "</td>", "\n", "�"]
VOID = {"meta", "img", "br", "input", "link", "hr"}


def token(step: int, probability: float) -> SoftToken:
    shares = [probability, 0.05, 0.01, 0.005]
    return SoftToken(step, TOKENS, [5, 6, 7, 8], shares, 2.5 / step, probability, 0.01, 0.95, 0.9, 0.8)


def inspection(text: str, probability: float = 0.3) -> TextInspection:
    steps = [token(k, probability) for k in (1, 2, 3)]
    return TextInspection(text, steps, diagnose([probability] * 3, [0.8] * 3, [1.0, 0.95, 0.9]))


@pytest.fixture(scope="module")
def page() -> str:
    inspections = [inspection(text) for text in TEXTS] + [inspection("peaked", 0.97)]
    return inspection_page(inspections, {"model": "<b>model</b>", "K": "3"})


class Reader(HTMLParser):
    """Every element with its attributes and its own text; unclosed or crossed elements are an error."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[dict] = []
        self.found: list[dict] = []
        self.feed(markup)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.found.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open[-1]["tag"] == tag, f"</{tag}> closes <{self.open[-1]['tag']}>"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, **attributes: str) -> list[dict]:
        return [e for e in self.found if e["tag"] == tag and all(e.get(k) == v for k, v in attributes.items())]


def test_every_text_step_and_token_is_there(page):
    read = Reader(page)
    articles = read.all("article")
    assert len(articles) == 5
    texts = [p["text"] for p in read.all("p", **{"class": "text"})]
    assert texts[0] == ATTACK
    assert texts[1:4] == [
        "שלום \\u202eevil\\u202c مرحبا",
        "👩‍👩‍👧 \\x00\\x1b[31m\\x07 \\ud800 control",
        "plain\n\n  text",
    ]
    assert len(read.all("th", role="rowheader")) == 5 * 3
    codes = [code["text"] for code in read.all("code")]
    assert codes == ["␣the", "</td>", "\\n", "�"] * 15
    assert [article["data-warnings"] for article in articles] == ["0"] * 4 + ["1"]
    assert "What to do:" in read.all("ul", **{"class": "warnings"})[0]["text"]


def test_tables_are_tables_that_a_screen_reader_can_read(page):
    read = Reader(page)
    for table in read.all("table"):
        assert table["class"] in ("summary", "steps")
    assert len(read.all("caption")) == len(read.all("table")) == 6
    assert all(th.get("scope") in ("col", "row") for th in read.all("th"))
    assert read.found[0]["lang"] == "en"
    assert len(read.all("h1")) == len(read.all("main")) == 1
    # what scrolls can be reached by keyboard and has a name
    for region in read.all("div", **{"class": "scroll"}):
        assert region["tabindex"] == "0"
        assert region.get("aria-label") or region.get("aria-labelledby")
    long = Reader(inspection_page([inspection("word " * 400)])).all("p", **{"class": "text"})[0]
    assert (long["tabindex"], long["role"], long["aria-label"]) == ("0", "region", "text 1")
    ids = [e["id"] for e in read.found if e.get("id")]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in read.all("a")} <= set(ids)


def test_nothing_is_loaded_and_no_foreign_script_may_run(page):
    read = Reader(page)
    assert len(read.all("script")) == 1
    assert not read.all("img")
    assert not read.all("link")
    assert not [e for e in read.found if any(name.startswith("on") or name == "src" for name in e)]
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page
    assert "@import" not in page
    policy = read.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


@pytest.mark.parametrize("scheme", PALETTES)
def test_contrast_of_text_is_at_least_wcag_aa(scheme):
    palette = PALETTES[scheme]
    pairs = [(text, ground) for text in ("text", "quiet", "link") for ground in ("page", "raised")]
    for text, ground in [*pairs, ("warn", "warn-page"), ("warn", "page")]:
        assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)


def contrast(a: str, b: str) -> float:
    """Of WCAG 2.2."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# ---------------------------------------------------------------- a real browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (apt-get install chromium)")


def chromium(folder, *arguments: str) -> str:
    fixed = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder}/profile",
    ]
    done = subprocess.run([CHROMIUM, *fixed, *arguments], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def dom(page, tmp_path_factory) -> Reader:
    """The document after the browser has parsed it and its script has run."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "page.html").write_text(page, encoding="utf-8")
    return Reader(chromium(folder, "--dump-dom", f"file://{folder}/page.html").removeprefix("<!DOCTYPE html>"))


@browser
def test_the_script_runs_without_an_error_and_no_text_does(dom):
    root = dom.all("html")[0]
    assert root["data-ready"] == "5"
    assert "data-error" not in root
    assert "data-owned" not in root
    assert dom.all("output")[0]["text"] == "5 of 5 texts"
    assert "hidden" not in dom.all("form")[0]


@browser
def test_the_browser_sees_the_same_texts_rows_and_tokens(dom, page):
    written = Reader(page)
    for tag in ("article", "tr", "th", "td", "li", "code", "p", "caption", "script", "img"):
        assert [e["text"] for e in dom.all(tag)] == [e["text"] for e in written.all(tag)]


@browser
def test_the_filter_hides_texts_without_warnings(page, tmp_path):
    """The policy lets no second script in, so a copy without it drives the page as a user would."""
    drive = """<script>
      const warned = document.getElementById("warned");
      warned.checked = true; warned.dispatchEvent(new Event("change"));
      const seen = () => [...document.querySelectorAll("article")].filter((a) => a.checkVisibility()).length;
      const after = [seen()];
      warned.checked = false;
      const find = document.getElementById("find");
      find.value = "EVIL"; find.dispatchEvent(new Event("input"));
      after.push(seen());
      document.documentElement.dataset.seen = after.join(" ");
    </script></body>"""
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", drive)
    (tmp_path / "page.html").write_text(copy, encoding="utf-8")
    dumped = chromium(tmp_path, "--dump-dom", f"file://{tmp_path}/page.html")
    assert 'data-seen="1 1"' in dumped


@browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (420, "dark")])
def test_it_draws_at_any_width_in_both_schemes(page, tmp_path, width, scheme):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    preferred = [] if scheme == "light" else ["--blink-settings=preferredColorScheme=0"]
    shot = tmp_path / "shot.png"
    chromium(tmp_path, *preferred, f"--window-size={width},900", f"--screenshot={shot}", f"file://{tmp_path}/page.html")
    with image.open(shot) as drawn:
        pixels = drawn.convert("RGB")
        assert pixels.size == (width, 900)
        ground = "#{:02x}{:02x}{:02x}".format(*pixels.getpixel((2, 2)))
        assert ground == PALETTES[scheme]["page"]
        assert len(pixels.getcolors(1 << 20)) > 20


@browser
def test_it_prints(page, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    pdf = tmp_path / "page.pdf"
    chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", f"file://{tmp_path}/page.html")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert pdf.stat().st_size > 10_000
