"Names for anyone's pictures: the classifier, and `stanet predict` with its table, CSV and page."
import csv, os, sys
import numpy as np
import pytest, torch
from PIL import Image, ImageDraw
from conftest import ROOT, run
from stanet.classifier import Classifier, NotFittedError, read_pixels
from stanet.sources import decode
from stanet.weights import from_pretrained, predict
from test_site import BACKGROUND, LOADED, WIDE, browser  # noqa: F401  a fixture

KEY, FREE = "omniglot-5w1s-stanet3", "omniglot-60w1s-protonet"
NAMES = ["Äpfel, rot", "bars", "cross", "<ring>", "tree"]


def drawing(i, dx=0):
    "One of six characters: dark strokes on white, 105 by 90 pixels."
    picture = Image.new("RGB", (105, 90), "white")
    pen = ImageDraw.Draw(picture)
    lines = [
        [(30, 15, 30, 75), (30, 75, 80, 75)],
        [(25, 30, 80, 30), (25, 60, 80, 60)],
        [(25, 20, 80, 75), (80, 20, 25, 75)],
        [],
        [(52, 15, 52, 80), (25, 45, 52, 20), (80, 45, 52, 20)],
        [(20, 80, 52, 10), (52, 10, 85, 80), (20, 80, 85, 80)],
    ]
    for x0, y0, x1, y1 in lines[i]: pen.line((x0 + dx, y0, x1 + dx, y1), fill="black", width=4)
    if i == 3: pen.ellipse((28 + dx, 20, 78 + dx, 72), outline="black", width=4)
    return picture


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Examples of five classes, two pictures each; five new ones, one of which is broken."
    folder = tmp_path_factory.mktemp("names")
    for i, name in enumerate(NAMES):
        (folder / "examples" / name).mkdir(parents=True)
        for j in (0, 1): drawing(i, dx=3 * j).save(folder / "examples" / name / f"{j}.png")
    (folder / "new").mkdir()
    for i in (4, 0, 3, 1): drawing(i, dx=-3).save(folder / "new" / f"{9 - i} & co.png")
    (folder / "new" / "broken.png").write_bytes(b"\x89PNG no")
    return folder


@pytest.fixture(scope="module")
def net(): return from_pretrained(KEY)


@pytest.fixture(scope="module")
def fitted(net, place): return Classifier(net).fit(place / "examples")


def test_folder_lists_and_arrays_say_the_same(fitted, net, place):
    assert list(fitted.classes_) == sorted(NAMES)
    queries = [drawing(i, dx=-3) for i in range(5)]
    assert list(fitted.predict(queries)) == NAMES
    pictures = [drawing(i, dx=3 * j) for i in range(5) for j in (0, 1)]
    names = np.repeat(NAMES, 2)
    expected = fitted.predict_proba(queries)
    for given in (pictures, np.stack([np.asarray(picture) for picture in pictures])):
        found = Classifier(net, batch=3).fit(given, names).predict_proba(queries)
        assert np.allclose(found, expected, atol=1e-6)
    assert np.allclose(fitted.predict_proba(q for q in queries), expected, atol=1e-6)
    numbers = np.searchsorted(sorted(NAMES), names)
    assert np.allclose(predict(net, pictures, numbers, queries).numpy(), expected, atol=1e-6)


def test_generator_is_drawn_as_answers_are_taken(net):
    small = Classifier(net, batch=2, threads=1).fit([drawing(i) for i in range(3)], "abc")
    drawn = []
    def endless():
        while True:
            drawn.append(len(drawn))
            yield drawing(drawn[-1] % 3)
    answers = small.answers(endless())
    assert [small.classes_[next(answers).probabilities.argmax()] for _ in range(3)] == ["a", "b", "c"]
    answers.close()
    assert len(drawn) < 12


def test_fewer_and_more_classes(net):
    three = Classifier(net).fit([drawing(i) for i in range(3)], ["x", "y", "z"])
    probabilities = three.predict_proba([drawing(i, dx=2) for i in range(3)])
    assert probabilities.shape == (3, 3) and np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert probabilities.argmax(1).tolist() == [0, 1, 2]
    six = [drawing(i) for i in range(6)]
    refused = "6 classes: this network is trained for 5 .* give at most 5, .*protonet"
    with pytest.raises(ValueError, match=refused): Classifier(net).fit(six, range(6))
    assert Classifier(FREE).fit(six, range(6)).predict(six).tolist() == list(range(6))
    with pytest.raises(ValueError, match="examples of 1 class"): Classifier(net).fit(six, ["x"] * 6)


def test_network_is_as_it_was(net):
    net.train()
    net.backbone.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [part.training for part in net.modules()]
    try:
        classifier = Classifier(net, numberings=5).fit([drawing(i) for i in range(5)], NAMES)
        for answer in classifier.answers([drawing(0), drawing(1)]):
            assert torch.is_grad_enabled() and [part.training for part in net.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert [net.inductive, *(part.training for part in net.modules())] == [False, *modes]
    finally: net.eval()


def test_network_may_be_on_another_device():
    "The meta device stands for a GPU: whatever is left on the processor doesn't fit to it."
    pictures = [drawing(i) for i in range(6)]
    found = from_pretrained(KEY).to("meta").predict(pictures[:5], range(5), pictures)
    assert (found.device.type, found.shape) == ("meta", (6, 5))


def test_queries_go_through_in_batches(net, monkeypatch):
    "So memory doesn't grow with their number."
    embedded, embed = [], net.embed
    def noted(images):
        embedded.append(len(images))
        return embed(images)
    monkeypatch.setattr(net, "embed", noted)
    pictures = [drawing(i) for i in range(5)]
    assert len(predict(net, pictures, range(5), pictures[:1] * 70, batch=32)) == 70
    assert embedded == [5, 32, 32, 6]
    classifier = Classifier(net, batch=4).fit(pictures, NAMES)
    assert len(classifier.predict_proba(pictures[:1] * 9)) == 9
    assert max(embedded[4:]) == 4


def test_all_numberings_together_do_not_hang_on_the_first(net):
    pictures, queries = [drawing(i) for i in range(5)], [drawing(5), Image.effect_noise((40, 40), 90)]
    one, all_five = (Classifier(net, numberings=n).fit(pictures, "abcde") for n in (1, 5))
    turned = Classifier(net, numberings=5).fit(pictures, "bcdea")  # each class has another number
    found = turned.predict_proba(queries)[:, [1, 2, 3, 4, 0]]
    assert np.allclose(found, all_five.predict_proba(queries), atol=1e-5)
    once = Classifier(net).fit(pictures, "bcdea").predict_proba(queries)[:, [1, 2, 3, 4, 0]]
    assert not np.allclose(once, one.predict_proba(queries), atol=1e-5)


@pytest.mark.parametrize("key", ["omniglot-5w1s-maml", "omniglot-5w1s-gnn", FREE])
def test_other_methods_answer_each_picture_by_itself(key):
    classifier = Classifier(key).fit([drawing(i) for i in range(5)], NAMES)
    queries = [drawing(i, dx=3) for i in range(5)]
    together = classifier.predict_proba(queries)
    alone = np.concatenate([classifier.predict_proba([query]) for query in queries])
    assert np.allclose(alone, together, atol=1e-5)


def test_errors_in_words(net, fitted, place):
    with pytest.raises(NotFittedError, match="no examples yet; call fit"):
        Classifier(net).predict([drawing(0)])
    with pytest.raises(ValueError, match="3 names for 2 pictures"):
        Classifier(net).fit([drawing(0), drawing(1)], "abc")
    with pytest.raises(ValueError, match="broken.png: not a readable picture"):
        fitted.predict(place / "new")
    with pytest.raises(ValueError, match="picture 1: .* float64"):
        fitted.predict([drawing(0), np.zeros((9, 9))])


@pytest.mark.parametrize("form", ["jpg", "webp", "gif", "tif"])
def test_pixels_are_those_of_import(tmp_path, form):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"lying.{form}"
    drawing(0).save(path, **({} if form == "gif" else {"exif": exif}))
    for mode in ("L", "RGB"): assert np.array_equal(read_pixels(path, 28, mode), decode(path, 28, mode))


def stanet(*command, cwd, check=False):
    "Run the command in a folder that isn't the project's, with the project's package."
    begin = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from stanet.command import start; start()"
    return run(sys.executable, "-c", begin, *command, cwd=cwd, check=check)


@pytest.fixture(scope="module")
def named(place):
    "The whole command, run once."
    done = stanet("predict", KEY, "examples", "new/9 & co.png", "gone.png", "new",
                  "--csv", "names.csv", "--html", "names.html", cwd=place)
    with open(place / "names.csv", newline="", encoding="utf-8") as file: rows = list(csv.reader(file))
    return done, rows


def test_table_and_exit_code(named):
    done, rows = named
    assert done.returncode == 1 and done.stderr == "stanet: 2 of 7 pictures can't be read, see above\n"
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["picture", "names", "by", "probability"] and len(lines) == 8
    assert lines[1].startswith("new/9 & co.png  Äpfel, rot ")
    assert lines[2].startswith("gone.png        not a readable picture (no such file)")
    assert [line.split()[0] for line in lines[3:]] == ["new/5", "new/6", "new/8", "new/9", "new/broken.png"]


def test_csv_says_what_predict_proba_says(named, fitted, place):
    head, *rows = named[1]
    assert head == ["picture", "name", *sorted(NAMES)]
    given = [f"new/{name}" for name in ("5 & co.png", "6 & co.png", "8 & co.png", "9 & co.png", "broken.png")]
    assert [row[0] for row in rows] == ["new/9 & co.png", "gone.png", *given]
    good = [row for row in rows if row[2]]
    expected = fitted.predict_proba([place / row[0] for row in good])
    found = np.array([[float(number) for number in row[2:]] for row in good])
    assert np.abs(found - expected).max() < 1e-6
    assert [row[1] for row in good] == fitted.classes_[expected.argmax(1)].tolist()
    assert [row[1][:22] for row in rows if not row[2]] == ["not a readable picture"] * 2


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_page_in_a_browser(named, place, browser, width, scheme):  # noqa: F811
    page, asked = browser(width, scheme), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((place / "names.html").as_uri())
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate(WIDE) == []
    assert all(page.eval_on_selector_all("img", LOADED))
    assert (max(page.evaluate(BACKGROUND)) < 60) == (scheme == "dark")
    cards = page.locator("article")
    assert cards.count() == 7
    assert cards.nth(0).locator("figure img").count() == 3
    assert cards.nth(0).locator(".names li").first.inner_text().startswith("Äpfel, rot")
    assert "no such file" in cards.nth(1).inner_text()
    assert page.locator(".examples h3").all_inner_texts() == sorted(NAMES)
    page.context.close()


@pytest.mark.parametrize("command, answer", [
    (["no-such-run", "examples", "new"], "no weights for 'no-such-run': neither a file nor a run with "),
    ([KEY, "nowhere", "new"], "nowhere: no such folder; name the one with the class folders"),
    ([KEY, "new", "new"], "new: no class folders; images must lie in CLASS/ or PARENT/CLASS/ below it"),
    ([KEY, "one", "new"], "examples of 1 class: every picture would get its name; give two or more"),
    ([KEY, "examples", "empty"], "empty: no pictures in this folder"),
    ([KEY, "examples", "new", "--csv", "no/a.csv"], "no: no such folder for a.csv; make it first"),
    ([KEY, "examples", "new", "--csv", "empty"], "empty: a folder; name the file to write"),
    ([KEY, "examples", "new", "--numberings", "9"], "numberings: 9 is more than the 5 numbers"),
], ids=lambda v: " ".join(v[:3]) if isinstance(v, list) else "")
def test_one_line_of_error(place, monkeypatch, capsys, command, answer):
    "In this process, as the start of torch takes longest: the command's own `main`."
    from stanet.answers import main
    (place / "empty").mkdir(exist_ok=True)
    (place / "one" / "cat").mkdir(parents=True, exist_ok=True)
    drawing(0).save(place / "one" / "cat" / "0.png")
    before = sorted(os.listdir(place))
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["stanet", "predict", *command])
    with pytest.raises(SystemExit) as end: main()
    assert str(end.value).startswith(f"stanet: {answer}") and "\n" not in str(end.value)
    assert sorted(os.listdir(place)) == before and capsys.readouterr().out == ""


WITHOUT_HEAVY = """
import atexit, sys
sys.path.insert(0, {root!r})
heavy = {{"pandas", "papermill", "dvc", "accelerate", "matplotlib.pyplot", "scipy", "torchvision"}}
atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))
from stanet.command import start
start()
"""


def test_start_imports_nothing_of_trainings(place):
    "The command begins soon, as it waits for torch alone."
    done = run(sys.executable, "-c", WITHOUT_HEAVY.format(root=str(ROOT)),
               "predict", "--help", cwd=place, check=False)
    assert done.stderr == "[]\n" and "EXAMPLES has a folder of pictures for each class" in done.stdout
