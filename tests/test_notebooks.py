"Every notebook runs from top to bottom, and the package is what the notebooks export."
import pytest, torch
from stanet.site import render_and_keep
from conftest import ROOT, run

FOLDERS = (".", "methods", "project", "tutorials")
LIBRARY = [path for folder in FOLDERS for path in sorted((ROOT / "nbs" / folder).glob("*.ipynb"))]


NOTEBOOKS = [*LIBRARY, ROOT / "nbs" / "experiments" / "train.ipynb"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_checks_pass(notebook, monkeypatch):  # its page is kept, and test_site.py takes it
    monkeypatch.chdir(notebook.parent)
    monkeypatch.setenv("IN_TEST", "1")
    render_and_keep(notebook)
    assert torch.is_grad_enabled(), f"{notebook.name}: it leaves gradients off, and the next one trains"


def test_package_is_what_the_notebooks_export(project):
    for module in (project / "stanet").rglob("[a-z]*.py"): module.write_text("")
    run("nbdev_export", cwd=project)
    assert run("git", "status", "--porcelain", cwd=project).stdout == ""


def test_notebooks_are_clean(project):
    run("nbdev_clean", cwd=project)
    assert run("git", "status", "--porcelain", cwd=project).stdout == ""
