"""The same numbers on another machine: other variables, another language, home or folder, packs shared, two
commands at once. Each test is a report of someone whose machine was different; the page reliability lists them."""
import os, subprocess, sys
from pathlib import Path
import nbformat, pytest
from conftest import BIN, ROOT, clone, edit_params, run
from stanet.runtime import Checkpoints

KEY = "glyphs-5w1s-protonet"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def call(*command, cwd, code=ROOT, check=True, **variables):
    "A command of this environment whose package is that of the folder `code`, with further variables."
    env = {k: v for k, v in os.environ.items() if k not in ("STANET_DATA", "IN_TEST")}
    env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(code), "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env | variables, capture_output=True, text=True)
    said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    if check and done.returncode: raise AssertionError(f"{command} ended with {done.returncode}\n{said}")
    return done


def one_line(done, *words):
    "Whether a command failed with one line that has all the words."
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1, done.stderr[-3000:]
    for word in words: assert word in lines[0]


def changes(folder): return run("git", "status", "--porcelain", cwd=folder).stdout


def small(params):
    params["recipes"]["quick-protonet"].update(steps=60, tasks=2, regroupings=2, query=2)
    params["runs"][KEY].update(width=8)


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    "A project in a folder with a space and an umlaut, with a small run and its data."
    folder = clone(tmp_path_factory.mktemp("machines") / "my papers" / "stänet")
    edit_params(folder, small)
    call("stanet", "glyphs", cwd=folder)
    return folder


def trained(folder):
    "The history and the weights in the newest state of the one training in scratch/, which is removed."
    (states,) = (folder / "scratch").glob("glyphs-*")
    tensors, about = Checkpoints(states).latest()
    for path in states.iterdir(): path.unlink()
    states.rmdir()
    weights = {k: v.tolist() for k, v in tensors.items() if k.startswith("net.")}
    return about["history"], weights


@pytest.fixture(scope="module")
def plain(glyphs):
    call("stanet", "fit", KEY, cwd=glyphs)
    return trained(glyphs)


def test_variables_do_not_change_a_training(glyphs, plain):
    "Accelerate's, those of products in fewer bits, and Python's; in another language, from a folder below."
    given = dict(ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_DYNAMO_BACKEND="INDUCTOR")
    given |= dict(ONEDNN_DEFAULT_FPMATH_MODE="BF16", NVIDIA_TF32_OVERRIDE="1")
    given |= dict(PYTHONOPTIMIZE="2", PYTHONWARNINGS="error", PYTHONHASHSEED="7") | ASCII
    call("stanet", "fit", KEY, cwd=glyphs / "nbs", **given)
    assert trained(glyphs) == plain


def test_accelerates_settings_do_not_change_a_training(glyphs, plain, tmp_path):
    "`accelerate launch` reads the user's file and passes it on in variables."
    settings = tmp_path / "settings.yaml"
    lines = ["compute_environment: LOCAL_MACHINE", "distributed_type: 'NO'", "mixed_precision: bf16",
             "num_processes: 1", "num_machines: 1", "use_cpu: true"]
    settings.write_text("\n".join(lines))
    launch = ("-m", "accelerate.commands.launch", "--config_file", settings, "--no_python")
    call(sys.executable, *launch, BIN / "stanet", "fit", KEY, cwd=glyphs)
    assert trained(glyphs) == plain


def test_a_machine_leaves_no_trace_in_a_report(tmp_path):
    "No home, a language without UTF-8, a long folder for temporary files, settings of the user's own."
    folder = clone(tmp_path / "my papers" / "stänet")
    temporary, settings = tmp_path / ("x" * 90), tmp_path / "settings"
    temporary.mkdir()
    settings.write_text("savefig.dpi: 30\nfont.size: 30\n")
    given = ASCII | dict(HOME="/proc/nope", TMPDIR=str(temporary), MATPLOTLIBRC=str(settings), MPLBACKEND="agg")
    call("stanet", "report", "table4", cwd=folder, **given)
    call("stanet", "readme", cwd=folder, **given)
    assert changes(folder) == ""


WHERE = "import stanet\nprint('code in', stanet.__file__)"


def test_code_of_one_place(project, tmp_path):
    "In a worktree with other code, the command and the kernel of its notebooks are the worktree's."
    tree = tmp_path / "tree"
    run("git", "worktree", "add", "-q", tree, cwd=project)
    module = tree / "stanet" / "cli.py"
    text = module.read_text(encoding="utf-8")
    assert "are in order" in text
    module.write_text(text.replace("are in order", "are fine in this tree"), encoding="utf-8")
    assert "are fine in this tree" in call("stanet", "check", cwd=tree / "nbs").stdout
    parameter = nbformat.v4.new_code_cell("name = ''", metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    cells = [parameter, nbformat.v4.new_code_cell(WHERE)]
    report = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(report, tree / "nbs" / "results" / "where.ipynb")
    said = call("stanet", "report", "where", cwd=tree).stdout
    assert f"code in {tree / 'stanet' / '__init__.py'}" in said
