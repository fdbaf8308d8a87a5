"The `stanet` command: what a user gets wrong is answered in one line, and nothing is left behind."
import json, sys
from concurrent.futures import ThreadPoolExecutor
import nbformat, pytest
from conftest import edit_params, run


@pytest.mark.parametrize("command, answer", [
    (["data", "import", "omniglot", "no-such-folder"], "no-such-folder: no such folder; name the folder with the files of omniglot"),
    (["data", "download", "mini"], "put them in one folder, then `stanet data import mini FOLDER`"),
    (["report", "table9"], "no report 'table9'; there are "),
    (["train", "mini"], "no run 'mini' in params.yaml; there are "),
    (["tasks", "omniglot-9w9s"], "no task set 'omniglot-9w9s' in params.yaml; there are "),
    (["tasks", "omniglot-5w1s"], "data/omniglot.safetensors is missing; `stanet data download omniglot` or `stanet data import omniglot FOLDER` makes it"),
    (["tasks", "mini-5w1s"], "data/mini.safetensors is missing; `stanet data import mini FOLDER` makes it"),
    (["fit", "omniglot-5w1s-stanet1"], "data/omniglot.safetensors is missing; `stanet data download omniglot` or `stanet data import omniglot FOLDER` makes it"),
], ids=lambda v: "-".join(v) if isinstance(v, list) else "")
def test_one_line_of_error(project, command, answer):
    done = run("stanet", *command, cwd=project, check=False)
    assert done.returncode == 1 and answer in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert run("git", "status", "--porcelain", "--ignored", cwd=project).stdout == ""


def test_all_problems_of_params_at_once(project):
    def spoil(p):
        p["runs"]["omniglot-5w1s-stanet1"].update(shot=3, lr=-1)
        p["runs"]["omniglot-5w1s-stanet3"].update(attention="Spatial", recipe="omniglott")
        p["runs"]["glyphs-5w1s-stanet3"].update(layer=3)
    edit_params(project, spoil)
    done = run("stanet", "check", cwd=project, check=False)
    assert done.returncode == 1 and "params.yaml: 5 problems" in done.stderr
    for field in ("omniglot-5w1s-stanet1.shot", "omniglot-5w1s-stanet1.lr", "omniglot-5w1s-stanet3.attention", "omniglot-5w1s-stanet3.recipe", "glyphs-5w1s-stanet3.layer"): assert f"runs.{field}" in done.stderr


def test_two_notebooks_started_together_have_a_kernel_each(project, tmp_path):
    cells = [nbformat.v4.new_code_cell("x = 0", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("print(x)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), tmp_path / "in.ipynb")
    code = "import sys; from stanet.experiment import execute; execute(sys.argv[1], sys.argv[2], {'x': int(sys.argv[3])})"
    with ThreadPoolExecutor() as pool: list(pool.map(lambda x: run(sys.executable, "-c", code, tmp_path / "in.ipynb", tmp_path / f"out{x}.ipynb", x, cwd=project), (1, 2)))
    printed = [json.loads((tmp_path / f"out{x}.ipynb").read_text())["cells"][-1]["outputs"][0]["text"] for x in (1, 2)]
    assert printed == [["1\n"], ["2\n"]]
