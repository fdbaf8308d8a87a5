"""The page to try a network on, in a real browser: what is drawn there is answered as `predict` answers it.

The networks are exported and the runtime is fetched from npm, unless a build has kept them."""
import base64, functools, http.server, io, shutil, threading
import numpy as np
import pytest
from PIL import Image
from test_site import CHROMIUM, FLAGS, NEAR, WIDE
import stanet.demo
from stanet.weights import from_pretrained

ANSWERED = "n => window.stanet.boards[n].answer"
FOUND = """n => {
    const { probabilities, labels, pictures, query, found } = window.stanet.boards[n].answer;
    const maps = {};
    for (const name of ['on_query', 'on_support', 'on_task']) {
        maps[name] = { data: Array.from(found[name].data), dims: Array.from(found[name].dims) };
    }
    const paper = picture => picture.paper.toDataURL('image/png');
    return { probabilities, labels, support: pictures.map(paper), query: paper(query), maps };
}"""
TINTED = """c => {
    const blank = document.createElement('canvas');
    [blank.width, blank.height] = [c.width, c.height];
    return c.toDataURL() !== blank.toDataURL();
}"""
STATUS = "document.querySelectorAll('.try-board .status')[{}].textContent"


def build(folder):
    "The page alone, as the site's build makes it. Returns what is missing."
    import smalldocs.site
    from stanet.site import Site, copy_to, make_offline, render_notebook, write_page
    nbs, proc = stanet.demo.root() / "nbs", folder / "proc"
    write_page(proc / "try.ipynb", render_notebook(nbs / "try.ipynb").cells)
    for pattern in ("*.yml", "*.css", "*.svg", "dark.html"):
        for file in nbs.glob(pattern): copy_to(file, proc)
    site = Site(smalldocs.site.load(proc), quiet=True)
    site.out = folder / "docs"
    site.build()
    make_offline(site.out)
    return stanet.demo.make_demo(site.out / "try")


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    if shutil.which("npm") is None:
        pytest.skip("no npm here: install it (Debian: apt-get install npm) to test the page")
    missing = build(folder)
    assert not missing, f"the page can't be tested: {missing}"
    return folder / "docs"


@pytest.fixture(scope="module")
def open_page(docs):
    "Opens the page of a folder, with a width and a scheme; notes errors and requests to other hosts."
    if CHROMIUM is None: pytest.skip("no Chromium here: install it (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright
    servers = []
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, env=NEAR, timeout=600_000)
        def new_page(folder=docs, width=1280, scheme="light", **options):
            handler = functools.partial(Quiet, directory=folder)
            servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
            site = f"http://127.0.0.1:{servers[-1].server_port}/"
            window = {"width": width, "height": 900}
            page = chromium.new_context(viewport=window, color_scheme=scheme, **options).new_page()
            page.set_default_timeout(600_000)
            page.problems = []
            def on_request(request):
                if not request.url.startswith((site, "data:", "blob:")): page.problems.append(request.url)
            page.on("request", on_request)
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            page.on("console", lambda m: m.type in ("error", "warning") and page.problems.append(m.text))
            page.goto(site + "try.html")
            page.wait_for_selector("html[data-try-ready]")
            return page
        yield new_page
        for server in servers: server.shutdown()


def drawn(url) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def sheet_of(page, i): return page.locator(".try-board").first.locator(".sheet").nth(i)


def draw(page, i, points):
    "A stroke on the sheet `i`, through points in [0, 1]."
    sheet = sheet_of(page, i)
    sheet.scroll_into_view_if_needed()
    box = sheet.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]: page.mouse.move(*place, steps=4)
    page.mouse.up()


STROKES = [
    [(.2, .2), (.8, .8), (.8, .2)],
    [(.2, .5), (.8, .5), (.5, .2)],
    [(.5, .1), (.5, .9), (.2, .7)],
    [(.2, .2), (.8, .2), (.2, .8), (.8, .8)],
    [(.3, .8), (.3, .2), (.7, .5)],
]


def same_as_predict(page, board):
    "The page's answer, and how far it is from that of `predict` for the pixels on the page."
    page.wait_for_function(ANSWERED, arg=board)
    found = page.evaluate(FOUND, board)
    key = page.evaluate("n => window.stanet.boards[n].network.key", board)
    support, query = [drawn(url) for url in found["support"]], drawn(found["query"])
    expected = from_pretrained(key).predict(support, found["labels"], [query])[0].numpy()
    return found, np.abs(np.array(found["probabilities"]) - expected).max()


def test_what_is_drawn_is_answered_as_predict_does(open_page):
    page = open_page()
    for i, points in enumerate(STROKES): draw(page, i, points)
    draw(page, 5, [(x + 0.03, y) for x, y in STROKES[3]])
    found, far = same_as_predict(page, 0)
    assert far < 1e-3
    assert found["labels"] == [0, 1, 2, 3, 4]
    assert np.argmax(found["probabilities"]) == 3
    on_query = np.array(found["maps"]["on_query"]["data"]).reshape(found["maps"]["on_query"]["dims"])
    assert np.allclose(on_query.sum((-2, -1)), 1, atol=1e-4)
    cards = page.locator(".try-board").first.locator(".card-of")
    assert cards.nth(3).get_attribute("class").split() == ["card-of", "best"]
    assert cards.nth(5).locator(".result").inner_text() == "D"
    assert page.evaluate(STATUS.format(0)).startswith("It is most like D (")
    shadow = sheet_of(page, 5).locator("canvas.shadow")
    assert shadow.evaluate(TINTED), "the attention lies over the drawing"
    page.locator(".try-board select").first.select_option("none")
    assert not shadow.evaluate(TINTED)
    cards.nth(3).locator("input").fill("zed")
    assert page.evaluate(STATUS.format(0)).startswith("It is most like zed (")
    assert page.problems == []


def test_keys_draw_undo_and_clear(open_page):
    page = open_page()
    sheet, strokes = sheet_of(page, 0), "() => window.stanet.boards[0].cards[0].pictures[0].strokes"
    sheet.focus()
    keys = "Space ArrowRight ArrowRight ArrowDown Space ArrowLeft"
    for key in keys.split(): page.keyboard.press(key)
    assert page.evaluate(strokes) == [[[105, 105], [117, 105], [129, 105], [129, 117]]]
    page.keyboard.press("z")
    assert page.evaluate(strokes) == []
    page.keyboard.press("Space")
    page.keyboard.press("Delete")
    assert page.evaluate(strokes) == []
    assert page.problems == []


def test_a_finger_draws_on_a_narrow_screen(open_page):
    page = open_page(width=360, scheme="dark", has_touch=True, is_mobile=True)
    assert page.evaluate(WIDE) == []
    sheet = sheet_of(page, 0)
    sheet.scroll_into_view_if_needed()
    box = sheet.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.evaluate("() => window.stanet.boards[0].cards[0].there.length") == 1
    page.get_by_text("Draw an example").tap()
    found, far = same_as_predict(page, 0)
    assert far < 1e-3
    assert page.evaluate(WIDE) == []
    assert page.problems == []


def photograph(folder, name, size, seed):
    "A picture of soft blobs in a file."
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    path = folder / name
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def test_pictures_from_files_are_named(open_page, tmp_path):
    page = open_page()
    fields = page.locator(".try-board").nth(1).locator("input[type=file]")
    files = [photograph(tmp_path, f"{i}.png", (130 + 40 * i, 90), i) for i in range(4)]
    fields.nth(0).set_input_files(files[:2])
    fields.nth(2).set_input_files(files[2:3])
    fields.nth(5).set_input_files(files[3:])
    page.wait_for_function(ANSWERED, arg=1)
    found = page.evaluate(FOUND, 1)
    assert found["labels"] == [0, 0, 2]
    net = from_pretrained(page.evaluate("() => window.stanet.boards[1].network.key"))
    expected = net.predict([Image.open(f) for f in files[:3]], [0, 0, 2], [Image.open(files[3])])[0].numpy()
    assert np.abs(np.array(found["probabilities"]) - expected).max() < 1e-3, "from the files, not the page"
    assert found["probabilities"][1] == found["probabilities"][3] == 0
    (tmp_path / "text.png").write_text("no picture")
    fields.nth(1).set_input_files(tmp_path / "text.png")
    page.wait_for_function(f"() => {STATUS.format(1)}.startsWith('text.png: ')")
    assert page.problems == []


def test_pixels_are_those_of_import(open_page):
    "Preparation in the page and in Python, bit for bit, from the same pixels, wide or square."
    from stanet.sources import prepare
    page = open_page()
    random = np.random.default_rng(0)
    for (height, width), channels in (((40, 61), 1), ((90, 200), 3), ((30, 84), 3), ((28, 28), 1)):
        rgba = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
        size = {1: 28, 3: 84}[channels]
        found = page.evaluate("""async ([data, width, size, channels]) => {
            const { prepare } = await import(new URL('try/prepare.js', location.href).href);
            const image = new ImageData(Uint8ClampedArray.from(data), width);
            return Array.from(prepare(image, size, channels));
        }""", [rgba.flatten().tolist(), width, size, channels])
        expected = prepare(Image.fromarray(rgba), size, {1: "L", 3: "RGB"}[channels])
        assert np.array_equal(np.array(found).reshape(channels, size, size), expected.transpose(2, 0, 1))


def test_without_npm_the_page_says_so(open_page, docs, tmp_path, monkeypatch):
    monkeypatch.setattr(stanet.demo, "runtime", lambda: exec("raise ValueError('no npm to fetch it with')"))
    shutil.copytree(docs, tmp_path / "docs", ignore=shutil.ignore_patterns("try"))
    assert stanet.demo.make_demo(tmp_path / "docs" / "try") == "no npm to fetch it with"
    page = open_page(tmp_path / "docs")
    expected = "The network can't be asked here: when this site was built, no npm to fetch it with."
    assert page.evaluate(STATUS.format(0)) == page.evaluate(STATUS.format(1)) == expected
    page.get_by_text("Draw an example").click()
    assert page.evaluate(STATUS.format(0)) == expected
    assert page.problems == []


def test_npm_that_fails_gives_one_line(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(stanet.demo, "root", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"npm could not fetch onnxruntime-web [\d.]+ \(npm error network\)"):
        stanet.demo.runtime()
    npm.unlink()
    with pytest.raises(ValueError, match="no npm to fetch it with"): stanet.demo.runtime()
    assert not (tmp_path / "scratch" / "npm").exists()
