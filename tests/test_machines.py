"""The same numbers on another machine: other variables, another language, home or folder, shared packs, two
commands at once. Each test is a report of someone whose machine was different; the page Reliability lists
them."""
import errno, hashlib, os, resource, shutil, signal, subprocess, sys
import nbformat, pytest, torch, yaml
import numpy as np
from PIL import Image
from conftest import BIN, ROOT, clone, edit_params, leave_only, run, without_power
from stanet import packs
from stanet.runtime import Checkpoints, exclusive_lock
from stanet.sharing import move_packs, pull_pack

KEY = "glyphs-5w1s-protonet"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def call(*command, cwd, code=ROOT, check=True, preexec_fn=None, **variables):
    """A command of this environment whose package is that of the folder `code`, with further variables;
    `preexec_fn` is called in its process before it starts."""
    env = {k: v for k, v in os.environ.items() if k not in ("STANET_DATA", "IN_TEST")}
    env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(code), "DVC_NO_ANALYTICS": "1"}
    words = list(map(str, command))
    options = dict(capture_output=True, encoding="utf-8", preexec_fn=preexec_fn)
    done = subprocess.run(words, cwd=cwd, env=env | variables, **options)
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


FIT = f"""
from stanet.experiment import fit, load_data
from stanet.parameters import find_run
run = find_run("{KEY}")
fit(run, load_data(run.pack))
"""


@pytest.mark.parametrize("name, value", [
    ("ACCELERATE_DYNAMO_BACKEND", "inductor"), ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")])
def test_python_refuses_variables_that_change_a_training(glyphs, name, value):
    "A script that calls `fit` has read them before the package could leave them out."
    done = call(sys.executable, "-c", FIT, cwd=glyphs, check=False, **{name: value})
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: {name} is '{value}', which would change the numbers of a training")
    assert not list((glyphs / "scratch").glob("glyphs-*"))


def test_python_trains_as_the_command_does(glyphs, plain):
    "With what `accelerate launch` sets for its processes, and with a format that `fit` doesn't take."
    given = dict(ACCELERATE_DYNAMO_BACKEND="NO", ACCELERATE_MIXED_PRECISION="bf16")
    call(sys.executable, "-c", FIT, cwd=glyphs, **given)
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
    given = ASCII | dict(HOME="/proc/nope", TMPDIR=str(temporary), MPLBACKEND="agg")
    given |= dict(MATPLOTLIBRC=str(settings))
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


# -- another device, another length, other processes

def of_gpu(folder):
    "Make the newest state of a training in `folder` one of a GPU, whose generator has 16 bytes; its step."
    checkpoints = Checkpoints(folder)
    tensors, about = checkpoints.latest()
    tensors["sampler.generator"] = torch.arange(16, dtype=torch.uint8)
    about["devices"] |= {"device": "a GPU"}
    step = about.pop("step")
    for path in folder.glob("step-*"): path.unlink()
    checkpoints.save(step, tensors, about)
    return step


def fit(glyphs, *changes, check=True):
    return call("stanet", "fit", KEY, *changes, cwd=glyphs, check=check).stdout


def states_of(glyphs):
    return {path.parent for path in (glyphs / "scratch").glob("glyphs-*/step-*")}


def test_longer_trainings_and_a_state_of_a_gpu(glyphs):
    "Nothing of this is recorded, nothing begins anew in silence, nothing ends in a traceback."
    try:
        said = fit(glyphs, "schedule=constant")
        assert said.splitlines()[-1].startswith("step 60, loss ")
        (first,) = states_of(glyphs)
        of_gpu(first)
        said = fit(glyphs, "schedule=constant", "steps=70")
        assert f"{KEY} goes on at step 60 of the training with steps: 60" in said
        assert "going on at step 60: this cpu can't go on with the random numbers of the device" in said
        assert said.splitlines()[-1].startswith("step 70, loss ")
        (second,) = states_of(glyphs) - {first}
        assert Checkpoints(second).latest()[1]["devices"]["device"].startswith("a GPU; ")
        said = fit(glyphs, "steps=20")
        assert f"{KEY} begins at step 0: the state at step 70 was made with other schedule, steps" in said
        assert changes(glyphs).split() == ["M", "params.yaml"]
        refused = call("stanet", "fit", KEY, "step=20", cwd=glyphs, check=False)
        one_line(refused, f"runs.{KEY}.step: ", "steps")
    finally: shutil.rmtree(glyphs / "scratch")


# -- packs that machines share

OWN = """
recipes: {short: {steps: 10}}
task_sets: {toy-2w1s: {pack: toy, split: folder, way: 2, query: 1, n: 10}}
runs: {toy: {recipe: short, pack: toy, split: folder, way: 2, query: 1, pools: 2, width: 8}}
"""


def import_toy(folder, pictures, **variables):
    "Ten classes of two small pictures, imported as the pack toy."
    dice = np.random.default_rng(0)
    for i in range(20):
        path = pictures / f"class{i // 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dice.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    call("stanet", "data", "import", "toy", pictures, "--size", "16", cwd=folder, **variables)


def test_an_experiment_of_dvc_finds_the_shared_packs(project, tmp_path):
    "Without the ignored files; few columns show it; and a value that would change nothing is refused."
    packs = {"STANET_DATA": str(tmp_path / "packs")}
    import_toy(project, tmp_path / "pictures", **packs)
    assert not (project / "data").exists()
    more = yaml.safe_load(OWN)["task_sets"]
    def with_toy(params):
        leave_only(params, ("glyphs",), ("quickstart",))
        params["task_sets"].update(more)
    edit_params(project, with_toy)
    call("stanet", "fingerprints", cwd=project, check=False, **packs)
    someone = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    run("git", "add", "-A", cwd=project)
    run("git", *someone, "commit", "-q", "-m", "toy", cwd=project)
    begin = ("dvc", "exp", "run", "--temp", "--single-item", "--force")
    said = call(*begin, "-S", "task_sets.toy-2w1s.n=8", "tasks@toy-2w1s", cwd=project, **packs)
    assert "Ran experiment" in said.stdout
    shown = call("make", "-o", "env", f"BIN={BIN}", "experiments", "ARGS=--csv", cwd=project).stdout
    columns = shown[shown.index("Experiment,"):].splitlines()[0].split(",")
    assert "task_sets.toy-2w1s.n" in columns and len(columns) < 40
    change = ("-S", "networks.glyphs.layers=1", "fingerprints")
    refused = call("dvc", "exp", "run", "--single-item", *change, cwd=project, check=False, **packs)
    assert refused.returncode
    idle = "networks.glyphs.layers changes no run, as each has a copy of it"
    assert idle in refused.stdout + refused.stderr


def test_packs_pushed_and_pulled(project, tmp_path):
    "An interrupted copy goes on; one that isn't what data.dvc lists, or is changed on the way, is refused."
    here, shelf = project / "data", tmp_path / "shelf"
    here.mkdir()
    listed = {}
    for name in ("omniglot", "cifar100", "mini"):
        content = name.encode() * 100_000
        (here / f"{name}.safetensors").write_bytes(content)
        listed[name] = hashlib.md5(content).hexdigest()
    outs = [dict(md5=m, hash="md5", path=f"data/{n}.safetensors", cache=False) for n, m in listed.items()]
    (project / "data.dvc").write_text(yaml.safe_dump({"outs": outs}))
    said = call("stanet", "data", "push", shelf, cwd=project).stdout
    assert said.count(": sent, ") == 3 and len(list(shelf.iterdir())) == 3
    whole = (here / "mini.safetensors").read_bytes()
    for path in here.iterdir(): path.unlink()
    (here / "mini.safetensors.part").write_bytes(whole[:150_000])
    (shelf / "cifar100.safetensors").write_bytes(b"changed on the way")
    done = call("stanet", "data", "pull", shelf.as_uri(), cwd=project, check=False)
    assert done.returncode == 1 and "mini: fetched" in done.stdout and "omniglot: fetched" in done.stdout
    assert "cifar100.safetensors: what arrived has the MD5 " in done.stdout
    assert {p.name for p in here.iterdir()} == {"mini.safetensors", "omniglot.safetensors"}
    assert (here / "mini.safetensors").read_bytes() == whole
    one_line(call("stanet", "data", "pull", "pigeon://loft", cwd=project, check=False), "pigeon://loft: ")


def test_weights_pushed_and_pulled(project, tmp_path):
    "Weights that are missing come back, also after a break; changed ones are refused by the card."
    shelf, weights = tmp_path / "shelf", project / "runs" / FIRST / "model.safetensors"
    content = weights.read_bytes()
    assert f"{FIRST}: sent, " in call("stanet", "weights", "push", shelf, FIRST, cwd=project).stdout
    weights.unlink()
    part = project / "scratch" / "weights" / f"{FIRST}.safetensors.part"
    part.write_bytes(content[:10_000])
    assert f"{FIRST}: fetched, " in call("stanet", "weights", "pull", shelf, FIRST, cwd=project).stdout
    assert weights.read_bytes() == content and not part.exists()
    assert changes(project) == ""
    weights.unlink()
    (shelf / f"{FIRST}.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = call("stanet", "weights", "pull", shelf, FIRST, cwd=project, check=False)
    assert done.returncode == 1 and "nothing is kept" in done.stdout
    assert not weights.exists() and not part.exists()


@pytest.fixture(scope="module")
def bare(tmp_path_factory): return clone(tmp_path_factory.mktemp("bare") / "project")


FIRST = "omniglot-5w1s-stanet1"
NEEDS_A_PACK = [
    ("fit", FIRST), ("train", FIRST), ("test", FIRST, "omniglot-5w1s"), ("tasks", "omniglot-5w1s"),
    ("campaign", FIRST, "--minutes", "2"), ("report", "figure1"),
]


@pytest.mark.parametrize("command", NEEDS_A_PACK, ids=lambda c: c[0])
def test_every_command_says_which_pack_is_missing(bare, command, tmp_path):
    packs = str(tmp_path / "lab")
    done = call("stanet", *command, cwd=bare, check=False, STANET_DATA=packs)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in last, done.stderr[-2000:]
    name = "omniglot" if command[0] != "report" else ""
    assert f"{packs}/{name}" in last and "`stanet data pull URL` fetches it" in last


# -- disks and systems

def test_a_file_system_without_locks(tmp_path, monkeypatch):
    "Files are written whole, and a second process is refused, with what such a file system has."
    def no_locks(*_): raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", no_locks)
    with packs.atomic(tmp_path / "file") as temporary: temporary.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with exclusive_lock(tmp_path / "run"):
        with pytest.raises(BlockingIOError, match="another process is at work on run"):
            with exclusive_lock(tmp_path / "run", wait=0): pass
    with exclusive_lock(tmp_path / "run", wait=0): pass


def test_a_full_disk_while_packs_are_pulled(tmp_path):
    "Nothing but the part, with which the next try goes on."
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    shelf, here = tmp_path / "shelf", tmp_path / "here"
    shelf.mkdir()
    here.mkdir()
    (shelf / "toy.safetensors").write_bytes(b"toy" * 100_000)
    (shelf / "toy.md5").write_text(hashlib.md5(b"toy" * 100_000).hexdigest())
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try: said = list(move_packs(pull_pack, ["toy"], here, shelf.as_uri(), {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, usual)
    assert [good for _, good in said] == [False] and "File too large" in said[0][0]
    assert {p.name for p in here.iterdir() if not p.name.startswith(".")} == {"toy.safetensors.part"}
    assert [good for _, good in move_packs(pull_pack, ["toy"], here, shelf.as_uri(), {})] == [True]
    assert [p.name for p in here.iterdir()] == ["toy.safetensors"]


@pytest.fixture
def read_only(bare):
    "A clone in which nothing may be written."
    paths = [path for path in [bare, *bare.rglob("*")] if ".git" not in path.parts]
    for path in paths: path.chmod(path.stat().st_mode & ~0o222)
    yield bare
    for path in paths: path.chmod(path.stat().st_mode | 0o200)


WRITES = [  # a command, and what it can't write
    ("report table4", "scratch"),
    (f"cell runs/{FIRST}/card.json results/cells/new/a.json", "results/cells/new"),
]


def test_a_read_only_checkout(read_only):
    "What only reads works; each other command says in one line what it can't write. This holds for root too."
    call("stanet", "check", cwd=read_only, preexec_fn=without_power)
    for command, name in WRITES:
        done = call("stanet", *command.split(), cwd=read_only, check=False, preexec_fn=without_power)
        one_line(done, name, "Permission denied")
    assert changes(read_only) == ""


WINDOWS = """
import multiprocessing, sys, warnings
for name in ("fcntl", "resource", "termios", "pwd", "grp"): sys.modules[name] = None  # not on Windows
multiprocessing.set_start_method("spawn")
warnings.filterwarnings("error", category=EncodingWarning, module="stanet")  # a text file without encoding
from PIL import Image
from typer.testing import CliRunner
from stanet.cli import app
from stanet.weights import from_pretrained, predict
done = CliRunner().invoke(app, ["data", "import", "toy", sys.argv[1], "--size", "16"])
assert not done.exception, done.exception
assert CliRunner().invoke(app, ["data", "verify", "toy"]).output.startswith("toy: in order")
assert CliRunner().invoke(app, ["check"]).output.endswith("are in order\\n")
net = from_pretrained(sys.argv[2])
pictures = [Image.new("L", (28, 28), 40 * i) for i in range(5)]
print(predict(net, pictures, range(5), pictures).shape)
"""


def test_import_and_prediction_without_what_windows_lacks(tmp_path):
    "No fcntl, no resource, processes that spawn, and another encoding than UTF-8 where none is named."
    (tmp_path / "params.yaml").write_text(OWN)
    for i in range(20):
        path = tmp_path / "bilder" / f"größe{i // 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 20), 10 * i + 1).save(path)
    weights = ROOT / "runs" / FIRST / "model.safetensors"
    command = (sys.executable, "-X", "warn_default_encoding", "-c", WINDOWS, tmp_path / "bilder", weights)
    assert call(*command, cwd=tmp_path).stdout.splitlines()[-1] == "torch.Size([5, 5])"


NOT_ON_WINDOWS = """
import builtins, os, signal, subprocess, sys
HIDDEN = {"fcntl", "resource", "termios", "pwd", "grp"}
USERS = {"stanet", "filelock", "accelerate", "safetensors", "fsspec", "typer"}  # IPython asks for its system
usual = builtins.__import__

def import_(name, globals=None, *rest, **named):
    user = (globals or {}).get("__name__", "").split(".")[0]
    if name in HIDDEN and user in USERS: raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return usual(name, globals, *rest, **named)

builtins.__import__ = import_
usual_signal = subprocess.Popen.send_signal

def send_signal(process, number):
    if number == signal.SIGINT: raise ValueError(f"Unsupported signal: {number}")
    usual_signal(process, number)

subprocess.Popen.send_signal = send_signal
if os.path.basename(sys.argv[0] if sys.argv else "") != "dvc":
    import multiprocessing
    multiprocessing.set_start_method("spawn")
"""
SET = "glyphs-5w1s"
STAGES = [
    f"tasks {SET}", f"campaign {KEY} --minutes 0.75", f"train {KEY}", f"test {KEY} {SET}",
    f"cell runs/{KEY}/tests/{SET}/metrics.json results/cells/quickstart/{KEY}-on-{SET}.json",
]


def windows_language(folder) -> dict:
    "Variables of a language in cp1252, as Windows has in much of the world; ASCII where it can't be made."
    made = ["localedef", "-i", "en_US", "-f", "CP1252", folder / "en_US.CP1252"]
    if not shutil.which(made[0]) or subprocess.run(made, capture_output=True).returncode: return ASCII
    return ASCII | {"LOCPATH": str(folder), "LC_ALL": "en_US.CP1252"}


def test_the_quickstart_without_what_windows_lacks(glyphs, tmp_path):
    "Each stage of one of its runs, begun by a campaign; the training is in a kernel that lacks the same."
    (tmp_path / "sitecustomize.py").write_text(NOT_ON_WINDOWS)
    given = windows_language(tmp_path) | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{glyphs}"}
    try:
        for stage in STAGES:
            said = call("stanet", *stage.split(), cwd=glyphs, **given).stdout
            assert "failed" not in said, said  # the campaign's word for a training that ended otherwise
    finally: shutil.rmtree(glyphs / "scratch", ignore_errors=True)
    made = {p.name for p in (glyphs / "runs" / KEY).iterdir()}
    assert made == {"card.json", "history.csv", "model.safetensors", "tests", "train.ipynb"}
