"Lines end before the page does, and names exist: ruff, as pyproject.toml sets it. Cells have a sentence."
import json
import pytest
from conftest import ROOT, run

COLUMNS = 110
UNSEEN = ("#| hide", "#| default_exp")  # how cells begin that no page shows
FOLDERS = [ROOT / "nbs" / part for part in ("", "methods", "project", "tutorials")]
NOTEBOOKS = [path for folder in FOLDERS for path in sorted(folder.glob("*.ipynb"))]


def test_ruff_finds_nothing():
    done = run("ruff", "check", "--output-format", "concise", "--no-cache", ".", cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


def test_pre_commit_knows_its_hooks(project):
    run("pre-commit", "validate-config", cwd=project)


def test_no_line_of_code_runs_out_of_its_page():  # ruff passes over one that ends with an address
    long = []
    for path in NOTEBOOKS:
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
        seen = [line for line in lines if not line.startswith("#|")]
        long += [f"{path.name}: {line}" for line in seen if len(line) > COLUMNS]
    assert not long


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_have_a_sentence_before_them(path):
    cells = [(c["cell_type"], "".join(c["source"]).lstrip()) for c in json.loads(path.read_text())["cells"]]
    shown = [(kind, text) for kind, text in cells if not text.startswith(UNSEEN)]
    assert shown[0][0] == "markdown"
    bare = [text for (before, _), (kind, text) in zip(shown, shown[1:]) if before == kind == "code"]
    assert not bare, [text[:80] for text in bare]
