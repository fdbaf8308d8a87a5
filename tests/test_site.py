"""The site as a reader meets it.

Built without network, and opened in a real browser at the width of a screen and of a phone."""
import functools, http.server, json, os, re, shutil, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
import pandas as pd
import pytest, yaml
from conftest import ROOT, run

DOCS = ROOT / "_docs"
WRITTEN = ("sidebar.yml", "nbdev.yml")  # kept in git for those who have Quarto, and written by the build
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
NEAR = os.environ | {"TMPDIR": "/tmp"}  # Chromium opens a socket there, whose path must be short
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LONG_LINES = """() => {  // code of a page that has to be scrolled to be read
    const code = [...document.querySelectorAll('main pre.cell-code')];
    const beyond = code.filter(e => e.scrollWidth > e.clientWidth + 1);
    return beyond.map(e => e.textContent.trim().slice(0, 40));
}"""
WIDE = """() => {  // elements that reach beyond the window and can't be scrolled to
    const width = document.documentElement.clientWidth;
    const scrolls = e => {
        const style = getComputedStyle(e);
        return /auto|scroll/.test(style.overflowX) && e.getBoundingClientRect().right <= width + 1;
    };
    const hidden = e => e.matches('.katex-mathml, .visually-hidden');
    const within = e => {  // something that scrolls or can't be seen
        for (let p = e; p; p = p.parentElement) {
            if (scrolls(p) || hidden(p)) return true;
        }
        return false;
    };
    const reachesOut = e => {
        const box = e.getBoundingClientRect();
        if (!box.width || !box.height || box.right <= width + 1) return false;
        return !e.closest('svg') && !within(e);
    };
    const describe = e => e.tagName + '.' + e.className + ': ' + e.textContent.trim().slice(0, 40);
    const beyond = [...document.querySelectorAll('body *')].filter(reachesOut);
    const found = beyond.slice(0, 3).map(describe);
    if (document.documentElement.scrollWidth > width) found.push('the page itself');
    return found;
}"""
CUT_OFF = """() => {  // words of drawings that reach over their edge, by more than a pixel
    const cut = [];
    for (const drawing of document.querySelectorAll('main svg[role=img]')) {
        const whole = drawing.viewBox.baseVal;
        for (const text of drawing.querySelectorAll('text')) {
            const box = text.getBBox();
            const right = box.x + box.width - whole.x - whole.width, left = whole.x - box.x;
            const below = box.y + box.height - whole.y - whole.height, above = whole.y - box.y;
            if (Math.max(right, left, below, above) > 1) cut.push(text.textContent);
        }
    }
    return cut;
}"""
TEXT = """() => {  // what a reader sees, without code and without what KaTeX has set
    const copy = document.querySelector('main').cloneNode(true);
    copy.querySelectorAll('pre, code, script, style, .katex').forEach(e => e.remove());
    return copy.textContent;
}"""
FORMULA = r".{0,30}(?:\$|\\\(|\\\[).{0,30}"  # one that was not set, with what stands around it
ERRORS = "all => all.map(e => e.title)"
LOADED = "all => all.map(i => i.complete && i.naturalWidth > 0)"
BACKGROUND = """() => {  // red, green and blue
    const colour = getComputedStyle(document.body).backgroundColor;
    return colour.match(/\\d+/g).slice(0, 3).map(Number);
}"""
INVERTED = """all => all.map(e => [  // of each image: whether it is a drawing, and whether it is inverted
    e.classList.contains('drawing'),
    getComputedStyle(e).filter !== 'none',
])"""
THEME = """() => [
    document.documentElement.getAttribute('data-bs-theme'),
    getComputedStyle(document.body).backgroundColor,
]"""


class Links(HTMLParser):
    "Links, anchors, images and loaded files of a page."
    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.images, self.loads = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if "id" in a: self.ids.add(a["id"])
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag == "img": self.images.append(a)
        if tag == "link" and a.get("rel") in ("stylesheet", "icon"): self.loads.append(a["href"])
        if tag in ("script", "img") and a.get("src"): self.loads.append(a["src"])


@pytest.fixture(scope="module")
def pages():
    "The built site: name of each page -> what it links to, loads and shows."
    def written(): return [(ROOT / "nbs" / name).read_text() for name in WRITTEN]
    before = written()
    run(sys.executable, "-m", "stanet.site", cwd=ROOT)
    assert written() == before, f"the site's build wrote {' or '.join(WRITTEN)} anew: commit it"
    paths = sorted(DOCS.rglob("*.html"))
    return {path.relative_to(DOCS).as_posix(): Links(path.read_text()) for path in paths}


@pytest.fixture(scope="module")
def site(pages):
    "The address of a server of the built site."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=DOCS))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    "Opens a page of a given width in light or dark."
    if CHROMIUM is None:
        pytest.skip("no Chromium here: install it (Debian: apt-get install chromium) to test the site")
    from playwright.sync_api import sync_playwright
    patience = 600_000  # milliseconds: a busy machine is slow, which is no fault of the site
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, env=NEAR, timeout=patience)
        def new_page(width=1280, scheme="light"):
            window = {"width": width, "height": 900}
            page = chromium.new_context(viewport=window, color_scheme=scheme).new_page()
            page.set_default_timeout(patience)
            return page
        yield new_page


def page_of(path) -> str:
    "The page of a notebook: its path below nbs, without the number that orders the files."
    page = path.relative_to(ROOT / "nbs").with_suffix(".html").as_posix()
    return re.sub(r"(^|/)\d+_", r"\1", page)


def test_every_page_is_there(pages):
    expected = {
        "results/index.html",
        "reference/command.html",
        "reference/params.html",
        "project/modules.html",
    }
    for folder in (".", "methods", "tutorials", "project"):
        expected |= {page_of(p) for p in (ROOT / "nbs" / folder).glob("*.ipynb")}
    expected |= {f"results/{p.stem}.html" for p in (ROOT / "results").glob("*.ipynb")}
    expected |= {f"runs/{p.parent.name}.html" for p in (ROOT / "runs").glob("*/card.json")}
    assert set(pages) == expected
    assert {"index.html", "methods/stanet.html", "project/ledger.html"} <= expected


def test_sidebar_follows_the_data(pages):
    sidebar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text())
    contents = sidebar["website"]["sidebar"]["contents"]
    groups = {c["section"]: c["contents"] for c in contents if isinstance(c, dict)}
    assert groups["The library"] == sorted(p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))
    assert groups["Methods"] == "methods/*.ipynb"
    assert groups["The project"] == "project/*.ipynb"


def leads_somewhere(pages, name, link) -> bool:
    "Whether a link on the page `name` leads to a file of the site, and to an anchor that its page has."
    target, anchor = urldefrag(urljoin(f"/{name}", link))
    target = unquote(target).lstrip("/")
    if target == "" or target.endswith("/"): target += "index.html"
    if not (DOCS / target).is_file(): return False
    if not anchor or target not in pages: return True
    return unquote(anchor) in pages[target].ids


def test_links_lead_somewhere(pages):
    wrong = []
    for name, page in pages.items():
        for link in page.links + page.loads:
            if urlsplit(link).scheme: continue  # leads out of the site
            if not leads_somewhere(pages, name, link): wrong.append(f"{name}: {link}")
    assert not wrong


def test_pages_stand_alone(pages):
    loaded, absolute, undescribed = [], [], []
    for name, page in pages.items():
        loaded += [(name, f) for f in page.loads if urlsplit(f).scheme not in ("", "data")]
        absolute += [(name, link) for link in page.links if link.startswith("/")]
        silent = [i for i in page.images if not i.get("alt", "").strip()]
        undescribed += [(name, i.get("src", "")[:60]) for i in silent]
    assert loaded == []
    assert absolute == [], "the site may lie in a folder"
    assert undescribed == []
    assert [n for n in pages if (DOCS / n).stat().st_size > 1_500_000] == []


def test_graph_of_modules_leads_to_each_module(pages):
    graph = pages["project/modules.html"]
    text = (DOCS / "project" / "modules.html").read_text()
    for page in ("packs.html", "attention.html", "methods/maml.html", "project/bench.html"):
        link = page.removeprefix("project/") if page.startswith("project/") else f"../{page}"
        assert link in graph.links, page
    assert text.count("<rect") == sum(1 for p in (ROOT / "stanet").rglob("[a-z]*.py"))
    assert "project/modules.html" in pages["index.html"].links  # from the sidebar


def test_every_run_of_a_table_is_one_click_away(pages):
    for path in (ROOT / "results").glob("*.csv"):
        table = pd.read_csv(path)
        if "run" not in table: continue  # the numbers of a figure
        keys = " ".join(table.query("status == 'measured'").run).split()
        assert {f"../runs/{k}.html" for k in keys} <= set(pages[f"results/{path.stem}.html"].links)


def test_a_run_leads_to_each_report_it_stands_in(pages):
    for cell in (ROOT / "results" / "cells").glob("*/*.json"):
        if not (ROOT / "results" / f"{cell.parent.name}.ipynb").is_file(): continue  # not made yet
        run_key = json.loads(cell.read_text())["run"]
        assert f"../results/{cell.parent.name}.html" in pages[f"runs/{run_key}.html"].links


def test_a_run_shows_each_of_its_tests(pages):
    for path in (ROOT / "runs").glob("*/tests/*/metrics.json"):
        metrics = json.loads(path.read_text())
        text = (DOCS / "runs" / f"{path.parts[-4]}.html").read_text()
        assert path.parent.name in text
        assert f"{metrics['accuracy']:.2f} ± {metrics['ci95']:.2f}" in text


def test_a_notebook_that_leaves_its_folder_becomes_a_page_alone(tmp_path):
    text = {"cell_type": "markdown", "id": "say", "metadata": {}, "source": "# Away"}
    code = {
        "cell_type": "code",
        "id": "go",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": f"import os; os.chdir({str(tmp_path)!r})",
    }
    notebook = {"cells": [text, code], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "away.ipynb").write_text(json.dumps(notebook))
    render = "\n".join([
        "import sys",
        "from pathlib import Path",
        "from stanet.site import render_notebook",
        "render_notebook(Path(sys.argv[1]))",
    ])
    run(sys.executable, "-c", render, tmp_path / "away.ipynb", cwd=ROOT)


def test_reference_comes_from_the_code(pages):
    from stanet.cli import app
    from stanet.method import find_method, known_methods
    from stanet.parameters import RowEntry, Run, TaskSet
    from stanet.site import NOT_TYPED
    params = (DOCS / "reference" / "params.html").read_text()
    models = [Run, TaskSet, RowEntry, *(find_method(name).Options for name in known_methods())]
    fields = set()
    for model in models: fields |= set(model.model_fields)
    typed = sorted(fields - set(NOT_TYPED))
    assert [f for f in typed if f"<code>{f}</code>" not in params] == []

    command = (DOCS / "reference" / "command.html").read_text()
    names = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert [name for name in names if f"stanet {name}" not in command] == []


def problems_of(page, width):  # yields one line for each
    "What a reader would find wrong with the page that is open."
    for formula in re.findall(FORMULA, page.evaluate(TEXT)): yield f"{formula} is not rendered"
    yield from page.eval_on_selector_all(".katex-error", ERRORS)
    for element in page.evaluate(WIDE): yield f"wider than {width} px: {element}"
    for words in page.evaluate(CUT_OFF): yield f"a drawing cuts off {words!r}"
    for loaded in page.eval_on_selector_all("main img", LOADED):
        if not loaded: yield "an image is broken"


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (400, "dark")])
def test_every_page_in_a_browser(pages, site, browser, width, scheme):
    page, problems, now = browser(width, scheme), [], None
    def note(problem): problems.append(f"{now}: {problem}")
    def on_console(message):
        if message.type in ("error", "warning"): note(message.text)
    def on_request(request):
        if not request.url.startswith((site, "data:")): note(f"asks for {request.url}")
    page.on("console", on_console)
    page.on("pageerror", note)
    page.on("request", on_request)
    for now in pages:
        page.goto(site + now)
        for problem in problems_of(page, width): note(problem)
        is_recorded = now.startswith("runs/")  # as it was executed, with lines as they were
        if width < 1280 or is_recorded: continue
        for line in page.evaluate(LONG_LINES): note(f"code is wider than its box: {line}")
    shade = page.evaluate(BACKGROUND)
    page.close()
    assert not problems
    assert (max(shade) < 100) == (scheme == "dark")


def test_formulas_are_set(site, browser):
    page = browser()
    page.goto(site + "attention.html")
    assert page.locator("main .katex-display").count() >= 3
    assert page.locator("main .katex").count() > 20
    assert page.evaluate("() => document.fonts.check('16px KaTeX_Main')")
    page.close()


def test_search_finds_spatial_attention(site, browser):
    page = browser()
    page.goto(site)
    page.locator("input[type=search], .smalldocs-search input").first.fill("spatial attention")
    results = page.locator(".search-result")
    results.first.wait_for()
    assert "attention.html" in results.first.get_attribute("href"), results.all_inner_texts()[:3]
    results.first.click()
    page.wait_for_url("**/attention.html*")
    page.close()


def test_a_figure_leads_to_its_card(site, browser):
    page = browser()
    page.goto(site + "results/table4.html")
    page.locator("table.results a").first.click()
    page.wait_for_url("**/runs/*.html")
    run_key = Path(urlsplit(page.url).path).stem
    text = page.locator("main").inner_text()
    for path in (ROOT / "runs" / run_key / "tests").glob("*/metrics.json"):
        metrics = json.loads(path.read_text())
        assert f"{metrics['accuracy']:.2f} ± {metrics['ci95']:.2f}" in text
    for heading in ("Measured", "Time, device, code and versions", "Parameters", "Its notebook"):
        assert heading in text
    page.close()


def test_drawings_are_inverted_in_the_dark_and_other_figures_are_not(pages, site, browser):
    drawn = next(n for n in pages if 'class="img-fluid drawing"' in (DOCS / n).read_text())
    for scheme in ("light", "dark"):
        page = browser(scheme=scheme)
        page.goto(site + drawn)
        for drawing, inverted in page.eval_on_selector_all("main img", INVERTED):
            assert inverted == (drawing and scheme == "dark"), scheme
        page.close()


def test_light_and_dark_by_hand(site, browser):
    page = browser(scheme="light")
    page.goto(site)
    light = page.evaluate(THEME)
    page.evaluate("() => window.smalldocsToggleScheme()")
    page.wait_for_function("() => document.documentElement.getAttribute('data-bs-theme') === 'dark'")
    dark = page.evaluate(THEME)
    page.goto(site + "project/ledger.html")
    assert page.evaluate(THEME) == dark
    assert dark[1] != light[1]
    page.close()
