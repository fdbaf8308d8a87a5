"The `stanet` command: what a user gets wrong is answered in one line, and nothing is left behind."
import json, os, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import nbformat, pytest
from conftest import ROOT, clone, edit_params, run

ONE, THREE, GLYPHS = "omniglot-5w1s-stanet1", "omniglot-5w1s-stanet3", "glyphs-5w1s-stanet3"
GET_OMNIGLOT = "`stanet data download omniglot` or `stanet data import omniglot FOLDER` makes it"
NO_OMNIGLOT = f"data/omniglot.safetensors is missing; {GET_OMNIGLOT}"


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    "A project that no command here may change."
    return clone(tmp_path_factory.mktemp("unchanged") / "project with space")


@pytest.mark.parametrize("command, answer", [
    (["data", "import", "omniglot", "no-such-folder"],
     "no-such-folder: no such folder; name the folder with the files of omniglot"),
    (["data", "download", "mini"], "put them in one folder, then `stanet data import mini FOLDER`"),
    (["report", "table9"], "no report 'table9'; there are "),
    (["train", "mini"], "no run 'mini' in params.yaml; there are "),
    (["fit", "mini"], "no run 'mini' in params.yaml; there are "),
    (["test", "mini", "mini-5w1s"], "no run 'mini' in params.yaml; there are "),
    (["test", ONE, "omniglot-9w9s"], "no task set 'omniglot-9w9s' in params.yaml; there are "),
    (["test", ONE, "omniglot-5w1s"], NO_OMNIGLOT),
    (["test", GLYPHS, "glyphs-5w1s"], f"`stanet train {GLYPHS}` makes it"),
    (["test", ONE, "omniglot-5w1s", "--inductive"], "with stanet no answer depends on the other queries"),
    (["tasks", "omniglot-9w9s"], "no task set 'omniglot-9w9s' in params.yaml; there are "),
    (["tasks", "omniglot-5w1s"], NO_OMNIGLOT),
    (["tasks", "mini-5w1s"], "data/mini.safetensors is missing; `stanet data import mini FOLDER` makes it"),
    (["fit", ONE], NO_OMNIGLOT),
], ids=lambda v: "-".join(v) if isinstance(v, list) else "")
def test_one_line_of_error(unchanged, command, answer):
    done = run("stanet", *command, cwd=unchanged, check=False)
    assert done.returncode == 1 and answer in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert run("git", "status", "--porcelain", "--ignored", cwd=unchanged).stdout == ""


def test_a_test_of_another_way_is_refused(project):
    "Nothing in params.yaml is wrong: no report asks for this test."
    def seven(p): p["task_sets"]["omniglot-7w1s"] = dict(p["task_sets"]["omniglot-5w1s"], way=7)
    edit_params(project, seven)
    run("stanet", "check", cwd=project)
    done = run("stanet", "test", ONE, "omniglot-7w1s", cwd=project, check=False)
    said = f"omniglot-7w1s has 7 ways, but runs.{ONE} is trained for 5 and stanet takes no other number"
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_all_problems_of_params_at_once(project):
    def spoil(p):
        p["runs"][ONE].update(query=20, lr=-1, start="omniglot")
        p["runs"][THREE].update(attention="Spatial", recipe="omniglott")
        p["runs"][GLYPHS].update(layer=3)
        p["reports"]["table4"]["rows"][0].update(run="matching")
    edit_params(project, spoil)
    done = run("stanet", "check", cwd=project, check=False)
    assert done.returncode == 1 and "params.yaml: 7 problems" in done.stderr
    fields = (f"runs.{ONE}.shot", f"runs.{ONE}.lr", f"runs.{ONE}.start", f"runs.{THREE}.attention",
              f"runs.{THREE}.recipe", f"runs.{GLYPHS}.layer", "reports.table4.row 1.run")
    for field in fields: assert f"  {field}: " in done.stderr


EXECUTE = """
import sys
from stanet.experiment import execute
execute(sys.argv[1], sys.argv[2], {"x": int(sys.argv[3])})
"""


def test_two_notebooks_started_together_have_a_kernel_each(project, tmp_path):
    parameter = nbformat.v4.new_code_cell("x = 0", metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    cells = [parameter, nbformat.v4.new_code_cell("print(x)")]
    source = tmp_path / "in.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), source)
    def execute(x): run(sys.executable, "-c", EXECUTE, source, tmp_path / f"out{x}.ipynb", x, cwd=project)
    with ThreadPoolExecutor() as pool: list(pool.map(execute, (1, 2)))
    cells = [json.loads((tmp_path / f"out{x}.ipynb").read_text())["cells"] for x in (1, 2)]
    assert [c[-1]["outputs"][0]["text"] for c in cells] == [["1\n"], ["2\n"]]


STUB = """#!/bin/sh
echo "$1" >> {log}
mkdir -p .venv
"""


def test_an_environment_is_made_anew_where_the_project_was_moved(tmp_path):
    "An environment knows its folder: in another one its commands don't start."
    place, log, uv = tmp_path / "first place", tmp_path / "log", tmp_path / "bin" / "uv"
    place.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"): shutil.copy2(ROOT / name, place)
    uv.parent.mkdir()
    uv.write_text(STUB.format(log=log))
    uv.chmod(0o755)
    env = os.environ | {"PATH": f"{uv.parent}{os.pathsep}{os.environ['PATH']}"}
    def steps(folder):  # what `make env` asks uv for
        log.write_text("")
        subprocess.run(["make", f"PYTHON={sys.executable}", "env"], cwd=folder, env=env, check=True)
        return log.read_text().split()
    assert steps(place) == ["venv", "pip", "pip"]
    assert steps(place) == []
    moved = place.rename(tmp_path / "another")
    assert steps(moved) == ["venv", "pip", "pip"]
    assert steps(moved) == []
