"What the tests share: the project copied to a folder of its own, and commands run in it."
import ctypes, os, shutil, subprocess, sys
from pathlib import Path
import pytest, yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share the cores
ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

SLOW = ["test_pipeline.py", "test_faults.py"]  # first, one for each of two test processes


def place_in_line(item):
    name = item.path.name
    return SLOW.index(name) if name in SLOW else len(SLOW)


def pytest_collection_modifyitems(items): items.sort(key=place_in_line)


def run(*command, cwd, check=True, **options):
    "Run a command of this environment in `cwd`, with the package there; returns the finished process."
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(cwd)}
    env |= {"DVC_NO_ANALYTICS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("STANET_DATA", None)  # a folder of packs of whoever runs the tests
    env.pop("IN_TEST", None)  # set by nbdev's test runner, and makes nbdev_export do nothing
    words = list(map(str, command))
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, **options)
    said = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words)} ended with {done.returncode}\n{said}")
    return done


def clone(folder, without: tuple = ()) -> Path:
    """The project's files as they are now, in a git repository of their own: what a fresh clone would hold,
    but for the folders `without`."""
    files = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).stdout.split("\0")
    for name in filter(None, files):
        if not (ROOT / name).is_file() or name.startswith(without): continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    run("git", "init", "-q", "-b", "main", cwd=folder)
    run("git", "-c", "core.looseCompression=0", "add", "-A", cwd=folder)  # a third of the time
    someone = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    run("git", *someone, "commit", "-q", "-m", "clone", cwd=folder)
    return folder


def clone_without_lock(folder, **options) -> Path:
    "A clone in which DVC notes its stages anew: the lock of all recorded runs takes it seconds after each."
    clone(folder, **options)
    (folder / "dvc.lock").unlink()
    return folder


@pytest.fixture
def project(tmp_path): return clone(tmp_path / "project with space")


def edit_params(folder, change):
    "Rewrite params.yaml with what `change` does to it."
    path = folder / "params.yaml"
    params = yaml.load(path.read_text(), yaml.CSafeLoader)
    change(params)
    path.write_text(yaml.dump(params, Dumper=yaml.CSafeDumper, sort_keys=False))


def leave_only(params, packs: tuple, reports: tuple):
    "Take out the runs and task sets of other packs and the other reports: all are checked at every change."
    for section in ("runs", "task_sets"):
        params[section] = {k: v for k, v in params[section].items() if v["pack"] in packs}
    params["reports"] = {name: params["reports"][name] for name in reports}


def without_power():
    "As root, give up writing where the permissions forbid it, from the program started next on."
    if os.geteuid() != 0: return
    drop = 24  # PR_CAPBSET_DROP
    for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)
