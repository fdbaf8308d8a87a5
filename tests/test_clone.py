"What a fresh clone can do without data and without training."
import json
import pandas as pd
import pytest
from PIL import Image, ImageDraw
from conftest import ROOT, run
from stanet.network import STANet

PAPER_RUNS = sorted(p.parent.name for p in (ROOT / "runs").glob("*/card.json") if not p.parent.name.startswith("glyphs-"))


def test_table_needs_no_data(project):
    assert not (project / "data").exists()
    said = run("dvc", "repro", "--allow-missing", "report@table4", cwd=project).stdout
    assert "Running stage 'train@" not in said and "Running stage 'tasks@" not in said
    before = (ROOT / "results" / "table4.csv").read_text()
    run("dvc", "repro", "--single-item", "--force", "report@table4", cwd=project)
    assert (project / "results" / "table4.csv").read_text() == before


def test_failed_stage_keeps_what_was_recorded(project):
    failed = run("dvc", "repro", "--single-item", "--force", "train@omniglot-5w1s-stanet1", cwd=project, check=False)
    assert failed.returncode and "stanet data" in failed.stdout + failed.stderr
    assert run("git", "status", "--porcelain", "runs", cwd=project).stdout == ""


def test_table_is_what_the_runs_measured():
    table = pd.read_csv(ROOT / "results" / "table4.csv")
    measured = table[table.status == "measured"]
    assert len(measured) == 4
    for row in measured.itertuples():
        metrics = json.loads((ROOT / "runs" / row.run / "metrics.json").read_text())
        assert abs(metrics["accuracy"] - row.ours) < 0.006 and metrics["tasks"] == row.tasks >= 10_000 and metrics["parameters"] == row.params


@pytest.mark.parametrize("key", PAPER_RUNS)
def test_run_is_complete(key):
    folder = ROOT / "runs" / key
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "metrics.json", "history.csv", "tasks.npz", "card.json", "train.ipynb"}
    card = json.loads((folder / "card.json").read_text())
    assert card["metrics"] == json.loads((folder / "metrics.json").read_text()) and card["run"]["key"] == key
    assert (folder / "train.ipynb").stat().st_size < 200_000


def drawing(shape, dx=0, dy=0):
    "A character as someone might draw it: dark strokes on white, 105 pixels."
    picture = Image.new("L", (105, 105), 255)
    pen = ImageDraw.Draw(picture)
    lines = {"cross": [(25, 25, 80, 80), (80, 25, 25, 80)], "corner": [(30, 20, 30, 80), (30, 80, 80, 80)], "bars": [(25, 35, 80, 35), (25, 70, 80, 70)], "tree": [(52, 20, 52, 85), (25, 50, 52, 25), (80, 50, 52, 25)]}
    for x0, y0, x1, y1 in lines.get(shape, []): pen.line((x0 + dx, y0 + dy, x1 + dx, y1 - dy), fill=0, width=4)
    if shape == "ring": pen.ellipse((28 + dx, 25 + dy, 78 + dx, 80), outline=0, width=4)
    return picture


@pytest.mark.parametrize("key", [k for k in PAPER_RUNS if k.startswith("omniglot-5w1s-")])
def test_trained_network_classifies_drawings(key):
    shapes = ["ring", "cross", "corner", "bars", "tree"]
    net = STANet.from_pretrained(key)
    answers = net.predict([drawing(s) for s in shapes], range(5), [drawing(s, dx=4, dy=3) for s in ("tree", "ring", "bars")])
    assert answers.shape == (3, 5) and answers.argmax(1).tolist() == [4, 0, 3]


def test_readme_shows_the_measured_tables(project):
    run("stanet", "readme", cwd=project)
    assert run("git", "status", "--porcelain", "README.md", cwd=project).stdout == ""
    assert (ROOT / "results" / "table4.md").read_text().strip() in (ROOT / "README.md").read_text()
