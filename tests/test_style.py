"Lines end before the page does, and names exist: ruff, as pyproject.toml sets it."
from conftest import ROOT, run


def test_ruff_finds_nothing():
    done = run("ruff", "check", "--output-format", "concise", "--no-cache", ".", cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


def test_pre_commit_knows_its_hooks(project):
    run("pre-commit", "validate-config", cwd=project)
