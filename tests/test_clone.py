"What a fresh clone can do without data and without training."
import hashlib, json, re, shutil
import pandas as pd
import pytest
from PIL import Image, ImageDraw
from conftest import ROOT, run
from stanet.cli import packs_listed
from stanet.experiment import read_correct
from stanet.method import network_size
from stanet.parameters import Test as RunOnSet
from stanet.sources import SOURCES
from stanet.tables import test_folder as folder_of, tests_of as in_line
from stanet.weights import from_pretrained, predict, weights_digest

AGAIN = ("dvc", "repro", "--single-item", "--force")


def recorded(pattern):
    "The folders below runs/ with a file `pattern`, but for those of the quickstart, made where it runs."
    found = [p.relative_to(ROOT / "runs") for p in (ROOT / "runs").glob(pattern)]
    return sorted(ROOT / "runs" / p.parent for p in found if not p.parts[0].startswith("glyphs-"))


PAPER_RUNS = [folder.name for folder in recorded("*/card.json")]
PAPER_TESTS = [folder.relative_to(ROOT / "runs").as_posix() for folder in recorded("*/tests/*/metrics.json")]
TRAINED = {"model.safetensors", "history.csv", "card.json", "train.ipynb", "tests"}


def test_table_needs_no_data(project):
    assert not (project / "data").exists()
    said = run("dvc", "repro", "--allow-missing", "report@table4", cwd=project).stdout
    for stage in ("train", "further", "tasks", "test"): assert f"Running stage '{stage}@" not in said
    before = (ROOT / "results" / "table4.csv").read_text()
    run("dvc", "repro", "--single-item", "--force", "report@table4", cwd=project)
    assert (project / "results" / "table4.csv").read_text() == before


def test_failed_stage_keeps_what_was_recorded(project):
    failed = run(*AGAIN, "train@omniglot-5w1s-stanet1", cwd=project, check=False)
    assert failed.returncode and "stanet data" in failed.stdout + failed.stderr
    assert run("git", "status", "--porcelain", "runs", cwd=project).stdout == ""


def test_failed_test_keeps_what_was_recorded(project):
    failed = run(*AGAIN, "test@omniglot-5w1s-stanet1-on-omniglot-5w1s", cwd=project, check=False)
    assert failed.returncode and "stanet data" in failed.stdout + failed.stderr
    assert run("git", "status", "--porcelain", "runs", cwd=project).stdout == ""


def test_table_is_what_the_tests_measured():
    table = pd.read_csv(ROOT / "results" / "table4.csv")
    measured = table[table.status == "measured"]
    assert (measured.method == "STANet").sum() == 4
    for row in measured.itertuples():
        (name,) = in_line(row)
        metrics = json.loads((folder_of(ROOT / "runs", name) / "metrics.json").read_text())
        assert abs(metrics["accuracy"] - row.ours) < 0.006
        assert metrics["tasks"] == row.tasks >= 10_000
        assert metrics["parameters"] == row.params


def test_dvc_leaves_the_packs_alone(project):
    "What lies in data/ is the user's: DVC compares it with data.dvc, and deletes or replaces nothing."
    packs = {f"data/{name}.safetensors": f"not {name}".encode() for name in ("omniglot", "mini", "own")}
    (project / "data").mkdir()
    for path, content in packs.items(): (project / path).write_bytes(content)
    try:
        said = run("dvc", "status", "data.dvc", cwd=project).stdout
        assert re.findall(r"(\w+): +(\S+)", said.split("changed outs:")[1]) == [
            ("deleted", "data/cifar100.safetensors"),
            ("modified", "data/mini.safetensors"),
            ("modified", "data/omniglot.safetensors"),
        ]
        run("dvc", "checkout", "--force", "data.dvc", cwd=project)
        run("dvc", "gc", "--workspace", "--force", cwd=project)
        assert {path: (project / path).read_bytes() for path in packs} == packs
        assert run("git", "status", "--porcelain", "data.dvc", cwd=project).stdout == ""
    finally: shutil.rmtree(project / "data")


def test_packs_here_are_those_of_data_dvc():
    listed = packs_listed(ROOT / "data.dvc")
    assert set(listed) == set(SOURCES)
    for name, md5 in listed.items():
        path = ROOT / "data" / f"{name}.safetensors"
        if path.is_file(): assert hashlib.md5(path.read_bytes()).hexdigest() == md5


@pytest.mark.parametrize("key", PAPER_RUNS)
def test_run_is_complete(key):
    folder = ROOT / "runs" / key
    card = json.loads((folder / "card.json").read_text())
    file = f"runs/{key}/model.safetensors"
    outside = file in (ROOT / ".gitignore").read_text().splitlines()  # large ones, and replaced ones
    assert outside or card["weights"]["bytes"] < 8_000_000
    found = {p.name for p in folder.iterdir()}
    assert TRAINED - {"tests"} - ({"model.safetensors"} if outside else set()) <= found <= TRAINED
    assert card["run"]["key"] == key
    assert (folder / "train.ipynb").stat().st_size < 200_000


WITH_WEIGHTS = [k for k in PAPER_RUNS if (ROOT / "runs" / k / "model.safetensors").is_file()]


@pytest.mark.parametrize("key", WITH_WEIGHTS)
def test_weights_are_those_of_the_card(key):
    card = json.loads((ROOT / "runs" / key / "card.json").read_text())
    net = from_pretrained(ROOT / "runs" / key / "model.safetensors")
    assert weights_digest(net) == card["weights"]["sha256"]
    assert network_size(net) == card["weights"]["parameters"]


@pytest.mark.parametrize("place", PAPER_TESTS)
def test_test_is_complete(place):
    folder = ROOT / "runs" / place
    assert {p.name for p in folder.iterdir()} == {"metrics.json", "answers.npz"}
    metrics, correct = json.loads((folder / "metrics.json").read_text()), read_correct(folder)
    kind = metrics["inductive"], metrics.get("nearest", False)
    test = RunOnSet(metrics["run"], metrics["test"], *kind)
    assert place == test.folder.removeprefix("runs/")
    assert len(correct) == metrics["tasks"]
    assert abs(100 * correct.mean() / metrics["queries"] - metrics["accuracy"]) < 1e-3
    card = json.loads((ROOT / "runs" / metrics["run"] / "card.json").read_text())
    assert metrics["weights_sha256"] == card["weights"]["sha256"]


def test_every_cell_is_a_copy_of_its_test():
    cells = sorted((ROOT / "results" / "cells").glob("*/*.json"))
    assert cells
    for cell in cells:
        tested = folder_of(ROOT / "runs", cell.stem)
        assert cell.read_bytes() == (tested / "metrics.json").read_bytes()


def drawing(shape, dx=0, dy=0):
    "A character as someone might draw it: dark strokes on white, 105 pixels."
    picture = Image.new("L", (105, 105), 255)
    pen = ImageDraw.Draw(picture)
    lines = {
        "cross": [(25, 25, 80, 80), (80, 25, 25, 80)],
        "corner": [(30, 20, 30, 80), (30, 80, 80, 80)],
        "bars": [(25, 35, 80, 35), (25, 70, 80, 70)],
        "tree": [(52, 20, 52, 85), (25, 50, 52, 25), (80, 50, 52, 25)],
    }
    for x0, y0, x1, y1 in lines.get(shape, []):
        pen.line((x0 + dx, y0 + dy, x1 + dx, y1 - dy), fill=0, width=4)
    if shape == "ring": pen.ellipse((28 + dx, 25 + dy, 78 + dx, 80), outline=0, width=4)
    return picture


@pytest.mark.parametrize("key", [k for k in PAPER_RUNS if k.startswith("omniglot-5w1s-stanet")])
def test_trained_network_classifies_drawings(key):
    shapes = ["ring", "cross", "corner", "bars", "tree"]
    support, query = map(drawing, shapes), [drawing(s, dx=4, dy=3) for s in ("tree", "ring", "bars")]
    answers = predict(from_pretrained(key), list(support), range(5), query)
    assert answers.shape == (3, 5) and answers.argmax(1).tolist() == [4, 0, 3]


def test_readme_shows_the_measured_tables(project):
    run("stanet", "readme", cwd=project)
    assert run("git", "status", "--porcelain", "README.md", cwd=project).stdout == ""
    assert (ROOT / "results" / "table4.md").read_text().strip() in (ROOT / "README.md").read_text()


def test_the_container_does_what_make_does():
    "The Dockerfile's targets are the Makefile's, and what it leaves out is nothing that git has."
    steps = (ROOT / "Dockerfile").read_text()
    targets = [*re.findall(r"RUN make (\w+)", steps), *re.findall(r'CMD \["make", "(\w+)"\]', steps)]
    assert targets == ["env", "test", "quickstart"]
    for target in targets: run("make", "--dry-run", target, cwd=ROOT)
    lines = (ROOT / ".dockerignore").read_text().splitlines()[1:]
    assert len(lines) > 5
    assert run("git", "ls-files", *[f":(glob){line}" for line in lines], cwd=ROOT).stdout == ""
    assert run("git", "ls-files", "requirements.lock", "binder/postBuild", cwd=ROOT).stdout.count("\n") == 2
