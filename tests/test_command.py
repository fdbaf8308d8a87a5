"The `stanet` command: what a user gets wrong is answered in one line, and nothing is left behind."
import pytest
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
