"""The campaign against the project: runs killed at every point, and thousands of files changed in every way.

`make faults` runs all of it and writes results/faults.json;
`python tests/faults.py --kills 5 --inputs 100 --pipeline 0` is a taste. It ends with the line
`faults: kills S/K survived, inputs R refused, A accepted unchanged, W wrong`
and fails unless S = K and W = 0.
To try another kind of file, add a `Format` to FORMATS: a name, a function that makes the bytes of a sound
file, and one that reads a file and returns a digest of its content."""
import argparse, copy, errno, io, itertools, json, locale, os, pickle, random, re, resource
import shutil, signal, sys, tempfile, time, zipfile
from pathlib import Path
from typing import Callable, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # runs are forked from this process: no other threads
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import numpy as np, torch, yaml
import torch._dynamo  # comes with the first optimiser: once here instead of in every run  # noqa: F401
import stanet.episodes
from stanet import experiment, method, packs, parameters, runtime, sources, training, weights
from accelerate import Accelerator
from PIL import Image
from stanet.glyphs import glyphs

TEST = parameters.Test("glyphs-5w1s-stanet3", "glyphs-5w1s")
KEY = TEST.run
TESTED = (f"tests/{TEST.task_set}/answers.npz", f"tests/{TEST.task_set}/metrics.json")
FILES = ("model.safetensors", "history.csv", "card.json", *TESTED)
REPEATED = tuple(f for f in FILES if f != "card.json")  # a card holds the time that the run took


# ---------------------------------------------------------------- kills

def small(params):
    "Make the runs on glyphs so small that one takes a second, and keep the answer to every query."
    params["recipes"]["quick"].update(steps=40, tasks=2, regroupings=2, query=2)
    params["task_sets"][TEST.task_set].update(n=120, query=3)
    params["reports"]["quickstart"]["answers"] = True
    for key, run in params["runs"].items():
        if not key.startswith("glyphs-"): continue
        run["width"] = 8
        if run.get("method", "stanet") == "stanet": run.update(d_k=8, d_v=8)


def make_project(folder: Path):
    "A folder with params.yaml, the reports' notebooks and a small pack: what a run needs."
    shutil.copytree(ROOT / "nbs" / "results", folder / "nbs" / "results")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    small(params)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    shutil.copytree(ROOT / "packs", folder / "packs", ignore=shutil.ignore_patterns("glyphs*"))
    packs.save_pack(glyphs(classes=40, per_class=8), folder / "packs" / "glyphs.safetensors")


def whole_run():
    "What the stages of a run do: fit, record, test. Every 5 steps a row of the history and a state."
    params = parameters.load_params(thorough=False)
    run = params.runs[KEY]
    pack = experiment.load_data(run.pack)
    net, history, trained = experiment.fit(run, pack, training.Pace(every=5, save_seconds=0.0))
    experiment.record(run, net, history, trained, pack)
    experiment.run_test(TEST, params)


def die(*_): os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, nth, act=die, about=lambda *_: True, after=False):
    "Let the `nth` call of `owner.name` whose arguments fit `about` be the last thing that this process does."
    usual, seen = getattr(owner, name), [0]
    def call(*args, **kwargs):
        if about(*args): seen[0] += 1
        last = about(*args) and seen[0] == nth
        if last and not after: act(*args)
        result = usual(*args, **kwargs)
        if last: act(*args)
        return result
    setattr(owner, name, call)


def name_of(handle) -> str:
    "The path behind an open file, or nothing where the system doesn't tell."
    link = Path("/proc/self/fd") / str(handle)
    return os.readlink(link) if link.parent.exists() else ""


def half_written(handle):
    "The file is cut in the middle, as if the process had ended while it wrote."
    if path := name_of(handle): os.truncate(path, os.path.getsize(path) // 2)
    die()


NO_ROOM = "no room for"


def no_room(*_):
    "What a full disk says."
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def writes(name): return lambda handle, *_: Path(name_of(handle)).name.startswith(name)
def moves(name): return lambda source, *_: Path(source).name.startswith(name)


POINTS = {
    "drawing tasks": lambda n: before(stanet.episodes.Episodes, "batch", n),
    "augmenting images": lambda n: before(training, "augment", n),
    "in the backward pass": lambda n: before(Accelerator, "backward", n, after=True),
    "between step and average": lambda n: before(training.State, "advance", n),
    "adding to the history": lambda n: before(training.State, "close_window", n, after=True),
    "collecting a state": lambda n: before(training.State, "tensors", n, after=True),
    "writing a state": lambda n: before(os, "fsync", n, half_written, writes("step-")),
    f"{NO_ROOM} a state": lambda n: before(os, "fsync", n, no_room, writes("step-")),
    "renaming a state": lambda n: before(os, "replace", n, die, moves("step-")),
    "removing an old state": lambda n: before(Path, "unlink", n, die, moves("step-")),
    "a state just written": lambda n: before(os, "replace", n, die, moves("step-"), after=True),
    "restoring a state": lambda n: before(training.State, "restore", 1, after=True),
    "between training and test": lambda n: before(experiment, "run_test", 1),
    "reading the stored weights": lambda n: before(experiment, "from_pretrained", 1, after=True),
    "writing the task set": lambda n: before(os, "fsync", 1, half_written, writes("glyphs-5w1s.safetensors")),
    "embedding test images": lambda n: before(experiment, "embed_images", 1),
    "answering test tasks": lambda n: before(experiment, "answer", 1, after=True),
}
for file in (Path(f).name for f in FILES):
    POINTS[f"writing {file}"] = lambda n, f=file: before(os, "fsync", 1, half_written, writes(f))
    POINTS[f"{file} just written"] = lambda n, f=file: before(os, "replace", 1, die, moves(f), after=True)
    POINTS[f"{NO_ROOM} {file}"] = lambda n, f=file: before(os, "fsync", 1, no_room, writes(f))
ANY = "any moment"


def without_home():
    "A home folder that doesn't exist."
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"): os.environ.pop(name, None)
    os.environ["HOME"] = "/nowhere"


def long_temporary():
    "A folder for temporary files whose name is longer than a socket's may be."
    folder = Path(tempfile.mkdtemp(prefix="é" * 30, dir="..")).resolve() / ("temporary files " * 6)
    folder.mkdir()
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None


def seeds_of_a_user():
    np.random.seed(time.time_ns() % 2 ** 32)
    torch.manual_seed(time.time_ns())


def for_nobody_else(): os.umask(0o077)
def language_of_c(): locale.setlocale(locale.LC_ALL, "C")


SURROUNDINGS = {  # what may differ between the process that was killed and the one that goes on
    "as usual": lambda: None,
    "no home folder": without_home,
    "a long folder for temporary files": long_temporary,
    "files for nobody else": for_nobody_else,
    "another language": language_of_c,
    "other seeds of numpy and torch": seeds_of_a_user,
}
MOVED, TWICE = "a moved folder", "two at once"


def spawn(folder: Path, point=None, nth=1, where="as usual") -> int:
    "Fork a process that does the whole run in `folder`, to be killed at `point`; returns its id."
    if (pid := os.fork()): return pid
    try:
        os.chdir(folder)
        SURROUNDINGS[where]()
        log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if point: POINTS[point](nth)
        whole_run()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally: os._exit(1)


def ended(pid) -> int:
    "The exit status of a process, negative for a signal."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def results(folder):
    "What a run made that every run makes alike: name -> bytes, None where it is missing."
    paths = {f: folder / "runs" / KEY / f for f in REPEATED}
    return {f: path.read_bytes() if path.is_file() else None for f, path in paths.items()}


def left_over(folder):
    "Files that no run that was left alone has."
    run, unfinished = folder / "runs" / KEY, lambda name: name.endswith(".partial") or name.startswith(".tmp")
    strange = [str(p.relative_to(folder)) for p in folder.rglob("*") if unfinished(p.name)]
    made = [p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()]
    return strange + [name for name in made if name not in (*FILES, "train.ipynb")]


class Count(dict):
    "Counts by name and outcome."
    def add(self, name, **outcomes):
        row = self.setdefault(name, {})
        for k, n in outcomes.items(): row[k] = row.get(k, 0) + n

    def total(self, outcome): return sum(row.get(outcome, 0) for row in self.values())


def not_survived(killed, folder, expected, said) -> str:
    "What to say of a run that came out otherwise."
    different = [f for f, b in results(folder).items() if b != expected[f]]
    points, more = " and then ".join(killed), left_over(folder)
    return f"not survived: {points}; left over {more}, different {different}\n{said}"


def kill_once(folder: Path, point: str, nth: int, moment: float) -> bool:
    "Start the run, and kill it at `point` or after `moment` seconds; returns whether that is how it ended."
    pid = spawn(folder, None if point == ANY else point, nth)
    if point == ANY:
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)  # the process is still ours, also when it has ended
    return ended(pid) == (1 if point.startswith(NO_ROOM) else -signal.SIGKILL)


def gone_on(folder: Path, where: str) -> tuple[Path, bool]:
    "Start a killed run again in other surroundings: where it is now, and whether it came to its end."
    if where == MOVED: folder = folder.rename(folder.with_name("killed, then moved to ü"))
    pids = [spawn(folder, where=where if where in SURROUNDINGS else "as usual")]
    if where == TWICE: pids.append(spawn(folder))  # one of the two may be refused: the other is at work
    return folder, 0 in [ended(pid) for pid in pids]


def kills(n: int, dice: random.Random, work: Path, say=print) -> tuple[Count, Count]:
    """Kill a small run `n` times, up to three times in a row, let it go on in other surroundings, and compare
    it with an uninterrupted one. Counts by point, and by surroundings."""
    count = Count()
    make_project(work / "fresh")
    shutil.copytree(work / "fresh", work / "whole")
    clock = time.perf_counter()
    assert ended(spawn(work / "whole")) == 0, (work / "whole.log").read_text()[-3000:]
    length, expected = time.perf_counter() - clock, results(work / "whole")
    assert None not in expected.values() and not left_over(work / "whole"), left_over(work / "whole")
    everywhere, order = [*POINTS, *[ANY] * (len(POINTS) // 3)], []
    places, elsewhere = itertools.cycle([*SURROUNDINGS, MOVED, TWICE]), Count()
    while count.total("kills") < n:
        folder, killed = work / "killed", []
        shutil.copytree(work / "fresh", folder)
        for _ in range(min(dice.choice((1, 1, 2, 2, 3)), n - count.total("kills"))):
            if not order: order = dice.sample(everywhere, len(everywhere))
            point = order.pop()
            if kill_once(folder, point, dice.randint(1, 6), dice.random() * length): killed.append(point)
        where = next(places)
        folder, done = gone_on(folder, where)
        good = done and results(folder) == expected and not left_over(folder)
        said = "".join(log.read_text() for log in work.glob("killed*.log"))
        if not good: say(not_survived([*killed, where], folder, expected, said[-1500:]))
        for point in killed: count.add(point, kills=1, survived=int(good))
        elsewhere.add(where, runs=1, survived=int(good))
        shutil.rmtree(folder)
        for log in work.glob("killed*.log"): log.unlink()
    return count, elsewhere


def kill_repro(process, dice: random.Random, length: float) -> bool:
    "Kill a `dvc repro` with its group of processes or all that it started; returns whether it still ran."
    import psutil
    time.sleep(length * (0.2 + 0.8 * dice.random()))
    if process.poll() is not None: return False
    everything = [process, *psutil.Process(process.pid).children(recursive=True)]
    if dice.random() < 0.5:
        for p in everything: p.kill()
    else: os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


PACK = b"a pack of somebody"
OTHERS = {  # what a user of Accelerate may have set for other trainings; a command begins without it
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
}


def pack_of(folder): return folder / "data" / "own.safetensors"


def pipeline_kills(n: int, dice: random.Random, work: Path, say=print) -> Count:
    "Kill a real `dvc repro` of a small run and its test `n` times, and compare."
    import subprocess
    from conftest import BIN, clone, edit_params, run
    count, name, fresh = Count(), "`dvc repro` at any moment", clone(work / "pipeline")
    edit_params(fresh, small)
    run("dvc", "repro", "glyphs", f"tasks@{TEST.task_set}", cwd=fresh)
    pack_of(fresh).parent.mkdir(exist_ok=True)
    pack_of(fresh).write_bytes(PACK)
    between = itertools.cycle([(), ("checkout", "--force"), ("gc", "-w", "-f")])
    def env(folder):
        paths = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder)}
        return os.environ | paths | {"DVC_NO_ANALYTICS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    def repro(folder, **more):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        command = [BIN / "dvc", "repro", f"test@{TEST.name}"]
        return subprocess.Popen(command, cwd=folder, env=env(folder) | more, **pipes)
    def status(folder): return run("git", "status", "--porcelain", "-uall", cwd=folder).stdout
    whole = work / "pipeline whole"
    shutil.copytree(fresh, whole)
    clock, process = time.perf_counter(), repro(whole)
    said = process.communicate()[0]
    assert process.returncode == 0, said[-3000:]
    length, expected, files = time.perf_counter() - clock, results(whole), status(whole)
    assert None not in expected.values()
    while count.total("kills") < n:
        folder = work / "pipeline killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh, folder)
        process = repro(folder)
        if not kill_repro(process, dice, length):
            process.communicate()
            continue
        tidy = next(between)
        if tidy: run("dvc", *tidy, cwd=folder)
        again = repro(folder, **OTHERS)
        said = again.communicate()[0]
        good = again.returncode == 0 and results(folder) == expected and pack_of(folder).read_bytes() == PACK
        good = good and status(folder) == files and not left_over(folder)
        point = f"`dvc repro` at any moment, then `dvc {' '.join(tidy)}`" if tidy else name
        if not good: say(not_survived([point], folder, expected, said[-2000:]))
        count.add(point, kills=1, survived=int(good))
    return count


# ---------------------------------------------------------------- changed files

class Format(NamedTuple):
    "A kind of file: how to make a sound one, and how the project reads it."
    name: str  # of the file too
    make: Callable[[], bytes]  # the bytes of a sound file
    load: Callable[[Path], str]  # a digest of what it read; a user's error is one that names the file
    change: Callable | None = None  # (bytes, dice) -> changed bytes, whether they must be refused


def written(write, name="file") -> bytes:
    "The bytes that `write(path)` writes."
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def small_pack():
    "A pack with everything that a pack can hold."
    dice = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 5, 5, 3), generator=dice, dtype=torch.uint8)
    labels, classes = torch.arange(6).repeat_interleave(4), [f"class {i} é" for i in range(6)]
    boxes = torch.randint(0, 5, (24, 4), generator=dice).short()
    return packs.Pack(images, labels, classes, ["even", "odd"] * 3, boxes, "small")


def small_net():
    torch.manual_seed(0)
    options = dict(layers=2, d_k=4, d_v=4, attention="SpatialAttention", sigma=0.25)
    data = dict(channels=3, size=16, n_semantic=6, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2])
    body = dict(backbone="Conv64", width=4, pools=2)
    return method.build(dict(method="stanet", options=options, way=3) | body | data)


def sha_of(tensors: dict, about: dict) -> str:
    return packs.digest(*(t for _, t in sorted(tensors.items())), text=json.dumps(about, sort_keys=True))


def load_weights(path):
    net = weights.load_network(path)
    return sha_of(net.state_dict(), net.about)


def small_tasks(): return stanet.episodes.draw_task_set(small_pack().labels, 3, 1, 2, 10)


def state_of(step):
    "Tensors and notes of a state."
    tensors = {"net.w": torch.arange(12.0) * step, "torch": torch.arange(20, dtype=torch.uint8)}
    return tensors, {"history": [{"step": step, "loss": 1.0}], "seconds": 1.0, "devices": {}}


STATES = [state_of(step) for step in (10, 20)]


def state_file() -> tuple[str, bytes]:
    "Name and bytes of the newer state."
    with tempfile.TemporaryDirectory() as folder:
        runtime.Checkpoints(folder).save(20, *STATES[1])
        path, = Path(folder).iterdir()
        return path.name, path.read_bytes()


def load_state(path):
    "Put the bytes where the newest state should be, after a sound one. Passed over counts as refused."
    tensors, about = STATES[0]
    with tempfile.TemporaryDirectory() as folder:
        states = runtime.Checkpoints(folder)
        states.save(10, tensors, about)
        shutil.copy(path, Path(folder) / state_file()[0])
        sha = sha_of(*states.latest())
    if sha != sha_of(tensors, about | {"step": 10}): return sha
    raise ValueError(f"{path}: passed over, the state before it is used")


def load_yaml(path):
    params = parameters.load_params(path)
    return packs.digest(text=json.dumps(params.model_dump(), sort_keys=True))


class Poison:
    "Unpickled, it leaves a mark."
    def __reduce__(self): return os.system, (f"touch {os.environ.get('FAULTS_MARK', '/dev/null')}",)


def zipped(name, content):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as z: z.writestr(name, content)
    return data.getvalue()


def foreign(dice) -> bytes:
    "Another file altogether."
    texts = {"pack": "{}", "tasks": "[]", "stanet": "null", "state": "3"}
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": texts, "x": tensor}).encode()
    return dice.choice([
        lambda: b"",
        lambda: b"\0" * dice.randint(1, 5000),
        lambda: dice.randbytes(dice.randint(1, 5000)),
        lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        lambda: pickle.dumps(Poison()),
        lambda: zipped("archive/data.pkl", pickle.dumps(Poison())),
        lambda: zipped("../outside.txt", "out"),
        lambda: b"null",
        lambda: b"[" * 100_000,
        lambda: b"\x89PNG\r\n\x1a\n" + dice.randbytes(100),
        lambda: (2 ** 63 - 1).to_bytes(8, "little") + b"{}",
        lambda: (10 ** 8).to_bytes(8, "little") + b"{" * 100,
        lambda: len(header).to_bytes(8, "little") + header + b"\0" * 4,
        lambda: dice.choice(FORMATS).make(),
    ])()


def changed(data: bytes, dice: random.Random) -> tuple[bytes, bool | None]:
    "`data` changed somewhere, half of the time in its first part, where a header is."
    def place(): return dice.randrange(min(len(data), 600) if dice.random() < 0.5 else len(data))
    def put(i, new, gone=None): return data[:i] + new + data[i + (len(new) if gone is None else gone):]
    def one_bit(i): return put(i, bytes([data[i] ^ 1 << dice.randrange(8)]))
    i, j = place(), place()
    return dice.choice([
        lambda: data[:i],
        lambda: data[:-dice.randint(1, 9)],
        lambda: one_bit(i),
        lambda: one_bit(j),
        lambda: put(i, dice.randbytes(dice.randint(1, 16))),
        lambda: put(i, dice.randbytes(dice.randint(1, 16)), 0),
        lambda: put(i, b"", dice.randint(1, 16)),
        lambda: put(i, str(dice.randint(0, 99)).encode()),
        lambda: put(i, b"\0" * dice.randint(1, 64)),
        lambda: put(i, data[j:j + 32]),
        lambda: data + dice.randbytes(dice.randint(1, 64)),
        lambda: data[:i] + data[i:j] + data[i:],
        lambda: data[i:] + data[:i],
        lambda: foreign(dice),
    ])(), None


# ---------------------------------------------------------------- params.yaml

NONSENSE = [[], {"a": 1}, None, "no such thing", -1, float("nan"), float("inf"), "5", [1, 2]]
NO_MAPPING = [None, "no such thing", 3, [[]], {"A b": {}}]  # nor a list of values or rows
WORDS = ("method", "variant", "backbone", "dataset")  # of a row: any text is right
MAY_BE_NONE = ("run", "paper", "paper_ci")  # of a row


def places(tree, prefix=()):
    "The paths of all fields in nested mappings and lists."
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for k, v in parts:
        yield (*prefix, k)
        if isinstance(v, (dict, list)): yield from places(v, (*prefix, k))


def a_place(tree, dice: random.Random, fits=lambda path, parent: True):
    "A place in one of the sections, each as likely: what holds it, the name or number there, the path."
    def parent_of(path):
        parent = tree
        for k in path[:-1]: parent = parent[k]
        return parent
    while True:
        section = dice.choice(list(tree))
        paths = [(section,), *places(tree[section], (section,))]
        if not (paths := [p for p in paths if fits(p, parent_of(p))]): continue
        path = dice.choice(paths)
        return parent_of(path), path[-1], path


def in_row(path) -> bool: return path[0] == "reports" and len(path) == 5  # reports, NAME, rows, NUMBER, field


def wrong_values(path, value) -> list:
    "What must not stand in the place of `value`."
    if isinstance(value, (dict, list)): return NO_MAPPING
    alike = ("no such thing", -1)  # of the same type, and still wrong
    wrong = [v for v in NONSENSE if not isinstance(v, type(value)) or v in alike or v != v]
    if in_row(path) and path[-1] in WORDS: wrong = [v for v in wrong if not isinstance(v, str)]
    if in_row(path) and path[-1] in MAY_BE_NONE: wrong = [v for v in wrong if v is not None]
    return wrong


def wrong_value(tree, dice):
    parent, last, path = a_place(tree, dice)
    parent[last] = dice.choice(wrong_values(path, parent[last]))
    return tree


def unknown_field(tree, dice):
    parent, last, path = a_place(tree, dice, lambda p, parent: isinstance(parent, dict))
    within = isinstance(parent[last], dict)
    named = path[0] in ("recipes", "networks") and len(path) == 1  # an empty one is sound, whatever its name
    field = dice.choice(["layer", "Recipe", "learning-rate", "x" * 50, "é"])
    (parent[last] if within else parent)[field] = dice.choice([1, "a", None] if named else [1, "a", None, {}])
    return tree


def mistyped_field(tree, dice):
    def fits(path, parent):
        named = isinstance(path[-1], str)  # sizes of images and places in a list are numbers
        return named and len(path) != 2  # names of entries are free
    parent, last, _ = a_place(tree, dice, fits)
    parent[last[:-1] + ("x" if last[-1] != "x" else "y")] = parent.pop(last)
    return tree


def mistyped_placeholder(tree, dice):
    "A name in braces that has no values, in the name of an entry or in one of its fields."
    def fits(path, parent):
        if len(path) == 2: return "{" in path[-1]
        if in_row(path) and path[-1] not in ("run", "task_set"): return False  # words, braces and all
        return isinstance(parent, dict) and isinstance(parent[path[-1]], str) and "{" in parent[path[-1]]
    parent, last, path = a_place(tree, dice, fits)
    if len(path) == 2: parent[last.replace("}", "x}", 1)] = parent.pop(last)
    else: parent[last] = parent[last].replace("}", "x}", 1)
    return tree


def missing_field(tree, dice):
    "A section, or a field that has no default."
    needed = {"task_sets": ("pack", "split"), "runs": ("recipe",), "reports": ("rows", "task_set")}
    def fits(path, parent):
        if len(path) == 1: return path[0] in ("recipes", "task_sets", "runs")
        return len(path) > 2 and path[-1] in ("for", *needed.get(path[0], ()))
    parent, last, _ = a_place(tree, dice, fits)
    del parent[last]
    return tree


def other_shape(tree, dice):
    return dice.choice([
        [tree], "text", 3, None, {"params": tree},
        tree | {"runs": list(tree["runs"].values())},
        tree | {"reports": list(tree["reports"])},
        tree | {"reports": {name: report["rows"] for name, report in tree["reports"].items()}},
        tree | {"cells": {}},
    ])


def repeated_line(tree, dice) -> str:
    out = yaml.safe_dump(tree, sort_keys=False)
    lines = [line for line in out.splitlines() if ":" in line and not line.strip().startswith("-")]
    line = dice.choice(lines)
    one_word = line.count(" ") == len(line) - len(line.lstrip()) + 1
    return out.replace(f"\n{line}\n", f"\n{line}\n{line}\n", 1) if one_word else f"{out}runs: {{}}\n"


def other_words(text: str, tree, dice) -> str:
    "The same parameters, written otherwise."
    lines = text.splitlines()
    outside = [i for i, line in enumerate(lines) if line and not line.startswith(" ")]
    lines.insert(dice.choice(outside), dice.choice(["# a comment", "", "   # indented: [", "#" * 100]))
    style = dict(sort_keys=dice.random() < 0.5, default_flow_style=dice.random() < 0.3)
    return dice.choice([
        lambda: "\n".join(lines) + "\n",
        lambda: yaml.safe_dump(tree, **style),
        lambda: text.replace("\n", "\r\n"),
        lambda: re.sub(r'"(\d+)":', r"\1:", json.dumps(tree)),  # JSON makes text of numbers that are names
    ])()


WRONG = [(wrong_value, 4), (unknown_field, 2), (mistyped_field, 2), (mistyped_placeholder, 1),
         (missing_field, 1), (other_shape, 1)]  # and how likely each is


def change_yaml(data: bytes, dice: random.Random) -> tuple[bytes, bool | None]:
    """params.yaml with a wrong, unknown, missing or repeated field (must be refused),
    in other words (must not), or with changed bytes."""
    kind = dice.choice(["wrong"] * 6 + ["twice", "words", "bytes", "bytes"])
    if kind == "bytes": return changed(data, dice)
    tree = copy.deepcopy(yaml.load(data.decode(), yaml.CSafeLoader))
    if kind == "words": return other_words(data.decode(), tree, dice).encode(), False
    if kind == "twice": return repeated_line(tree, dice).encode(), True
    kinds, weight = zip(*WRONG)
    spoil, = dice.choices(kinds, weight)
    return yaml.dump(spoil(tree, dice), Dumper=yaml.CSafeDumper, sort_keys=False).encode(), True


# ---------------------------------------------------------------- the files of a source

def images(n):
    "`n` small pictures."
    pixels = [np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8) for i in range(n)]
    return [Image.fromarray(p) for p in pixels]


def encoded(kind):
    data = io.BytesIO()
    images(1)[0].save(data, kind)
    return data.getvalue()


def cifar_part(part):
    "One of the three files of a CIFAR-100 with four classes of two images."
    names = {"fine_label_names": list("abcd"), "coarse_label_names": ["x", "y"]}
    if part == "meta": return pickle.dumps(names, protocol=2)
    first = part == "test"
    pixels = np.random.default_rng(first).integers(0, 256, (4, 3072), dtype=np.uint8)
    files = [f"{c}{int(first)}.png".encode() for c in "abcd"]
    labels = {b"fine_labels": [0, 1, 2, 3], b"coarse_labels": [0, 0, 1, 1]}
    return pickle.dumps({b"data": pixels, **labels, b"filenames": files}, protocol=2)


PARTS = ("train", "val", "test")


def mini_list(part):
    c = PARTS.index(part) + 1
    rows = [f"n{c:08d}{i:08d}.jpg,n{c:08d}\n" for i in (1, 2, 3)]
    return "".join(["filename,label\n", *rows]).encode()


def mini_cache(part):
    number = PARTS.index(part)
    pixels = np.random.default_rng(number).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)
    classes = {f"n{number}": [0, 1], f"m{number}": [2, 3]}
    return pickle.dumps({"image_data": pixels, "class_dict": classes}, protocol=2)


RECORDED = {}  # name -> digest of the pack that was read first, from a sound file


def recorded(name, pack):
    "The digest of a pack, if it is the recorded one; else what `stanet data verify` says."
    sha = packs.pack_digest(pack)
    if sha == RECORDED.setdefault(name, sha): return sha
    raise ValueError(f"{name}: the pack's hash isn't the recorded one")


def load_source(read, lay):
    """A reader for one file of a source: `lay(folder, path)` puts the file at `path` and sound ones
    into a folder, which `read` reads."""
    def load(path):
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / path.name
            tree.mkdir()
            lay(tree, path)
            return recorded(path.name, read(tree))
    return load


def lay_cifar(tree, path):
    for part in ("meta", "test"): (tree / part).write_bytes(cifar_part(part))
    shutil.copy(path, tree / "train")


def lay_cache(tree, path):
    for part in ("val", "test"): (tree / f"mini-imagenet-cache-{part}.pkl").write_bytes(mini_cache(part))
    shutil.copy(path, tree / "mini-imagenet-cache-train.pkl")


def lay_mini(tree, path):
    (tree / "images").mkdir()
    for part in ("val", "test"): (tree / f"{part}.csv").write_bytes(mini_list(part))
    shutil.copy(path, tree / "train.csv")
    rows = [line for part in PARTS for line in mini_list(part).decode().splitlines()[1:]]
    for row, image in zip(rows, images(9)): image.save(tree / "images" / row.split(",")[0])


def lay_class(tree, path):
    for c in "ab": (tree / c).mkdir()
    for c, image in zip("aabb", images(4)): image.save(tree / c / f"{len(list((tree / c).iterdir()))}.bmp")
    shutil.copy(path, tree / "a")


def read_cifar(folder): return sources.read_cifar100(folder, {"classes": 4, "parents": 2, "images": 2})
def read_cache(folder): return sources.read_mini(folder, 12, {"classes": 6, "images": 2})
def read_list(folder): return sources.read_mini(folder, 12, {"classes": 3, "images": 3})
def read_class(folder): return sources.read_folder(folder, 12)


def made_pack(path): packs.save_pack(small_pack(), path)
def made_tasks(path): stanet.episodes.save_tasks(small_tasks(), path, "a" * 64)
def made_weights(path): weights.save_network(small_net(), path, key="small")
def load_tasks(path): return stanet.episodes.tasks_digest(stanet.episodes.load_tasks(path, "a" * 64))


FORMATS = [
    Format("pack.safetensors", lambda: written(made_pack), lambda p: packs.pack_digest(packs.load_pack(p))),
    Format("tasks.safetensors", lambda: written(made_tasks), load_tasks),
    Format("model.safetensors", lambda: written(made_weights), load_weights),
    Format("state.safetensors", lambda: state_file()[1], load_state),
    Format("cifar-100-python", lambda: cifar_part("train"), load_source(read_cifar, lay_cifar)),
    Format("mini-imagenet-cache-train.pkl", lambda: mini_cache("train"), load_source(read_cache, lay_cache)),
    Format("train.csv", lambda: mini_list("train"), load_source(read_list, lay_mini)),
    Format("image.png", lambda: encoded("PNG"), load_source(read_class, lay_class)),
    Format("image.jpg", lambda: encoded("JPEG"), load_source(read_class, lay_class)),
    Format("params.yaml", lambda: (ROOT / "params.yaml").read_bytes(), load_yaml, change_yaml),
]


# ---------------------------------------------------------------- what the project says of a file

def same_values(text) -> bool:
    "Whether another YAML reader, DVC's, finds in the text what the project found, with no key twice."
    from ruamel.yaml import YAML
    try: return YAML(typ="safe", pure=True).load(text) == parameters.read_yaml(text)[0]
    except Exception: return False


def refusal(form: Format, must_refuse, said: str) -> str:
    "'refused' if a user could see from `said` what to do, else what is wrong."
    lines = said.splitlines()
    if form.name != "params.yaml":
        good = len(lines) == 1 and form.name in lines[0]
        return "refused" if good else f"wrong: not one line that names the file: {said}"
    if must_refuse is False: return f"wrong: a sound file is refused: {said}"
    good = lines[0].startswith("params.yaml: ") and len(lines) > 1
    return "refused" if good else f"wrong: refused without its name or a reason: {said}"


def outcome(form: Format, data: bytes, must_refuse, sound: str, folder: Path) -> str:
    "'refused', 'accepted', 'edit' (a changed value of params.yaml that is a right one too) or what is wrong."
    path, mark = folder / form.name, Path(os.environ["FAULTS_MARK"])
    path.write_bytes(data)
    try: got = form.load(path)
    except (ValueError, OSError, ArithmeticError, SyntaxError) as error:  # what the command says in one line
        return refusal(form, must_refuse, str(error))
    except BaseException as error: return f"wrong: {type(error).__name__}: {error}"
    finally:
        if mark.exists():
            mark.unlink()
            return "wrong: code was run"
    left = [p.name for p in folder.iterdir() if p != path]
    if left: return f"wrong: left {left}"
    if must_refuse: return "wrong: accepted what must be refused"
    if got == sound: return "accepted"
    edited = form.name == "params.yaml" and must_refuse is None and same_values(data.decode())
    return "edit" if edited else "wrong: accepted with another content"


def in_a_process(jobs, work, seconds=240) -> list:
    "The outcomes of `jobs`, in a process with limited memory and time; what it didn't come to is None."
    receive, send = os.pipe()
    if not (pid := os.fork()):
        try:
            os.close(receive)
            limit = 8 * 2 ** 30
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.alarm(seconds)
            with os.fdopen(send, "w") as out:
                for job in jobs: print(json.dumps(outcome(*job)), file=out, flush=True)
        finally: os._exit(0)
    os.close(send)
    with os.fdopen(receive) as source: found = [json.loads(line) for line in source if line.endswith("\n")]
    how, missing = ended(pid), len(jobs) - len(found)
    return found + [f"wrong: ended the process ({how})"] * (missing > 0) + [None] * (missing - 1)


def inputs(n: int, dice: random.Random, work: Path, say=print, formats=None) -> Count:
    "Change files `n` times in all and count what the project says of them."
    count, formats, folder = Count(), formats or FORMATS, work / "input with space"
    folder.mkdir(parents=True)
    os.environ["FAULTS_MARK"] = str(work / "mark")
    for k, form in enumerate(formats):
        data, wanted = form.make(), (n * (k + 1)) // len(formats) - (n * k) // len(formats)
        (folder / form.name).write_bytes(data)
        sound = form.load(folder / form.name)
        while wanted:
            jobs = []
            while len(jobs) < min(wanted, 50):
                new, must = (form.change or changed)(data, dice)
                if new != data: jobs.append((form, new, must, sound, folder))
            for job, found in zip(jobs, in_a_process(jobs, work)):
                if found is None or found == "edit": continue
                wanted -= 1
                wrong = found.startswith("wrong")
                is_ = {kind: int(found == kind) for kind in ("refused", "accepted")}
                count.add(form.name, inputs=1, **is_, wrong=int(wrong))
                if not wrong: continue
                kept = work / f"wrong-{count.total('wrong')}-{form.name}"
                kept.write_bytes(job[1])
                say(f"{form.name}: {found[:300]}; kept as {kept}")
        (folder / form.name).unlink(missing_ok=True)
    return count


# ---------------------------------------------------------------- all of it

def summary_of(killed: Count, files: Count) -> str:
    survived = f"kills {killed.total('survived')}/{killed.total('kills')} survived"
    answers = f"{files.total('refused')} refused, {files.total('accepted')} accepted unchanged"
    return f"faults: {survived}, inputs {answers}, {files.total('wrong')} wrong"


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=100, help="kills of small runs")
    options.add_argument("--pipeline", type=int, default=8, help="kills of a real `dvc repro` beside them")
    options.add_argument("--inputs", type=int, default=10_000, help="changed files")
    options.add_argument("--seed", type=int, default=0)
    where = "where to write the counts; results/faults.json for at least 100 kills and 10,000 inputs"
    options.add_argument("--output", type=Path, help=where)
    o = options.parse_args()
    torch.set_num_threads(1)
    clock, work = time.perf_counter(), Path(tempfile.mkdtemp(prefix="faults-"))
    os.chdir(ROOT)
    files = inputs(o.inputs, random.Random(o.seed), work)
    print(f"inputs: {dict(files)}", flush=True)
    killed, elsewhere = kills(o.kills, random.Random(o.seed), work) if o.kills else (Count(), Count())
    print(f"kills: {dict(killed)}", flush=True)
    if o.pipeline: killed |= pipeline_kills(o.pipeline, random.Random(o.seed), work)
    killed = Count(sorted(killed.items()))
    summary = summary_of(killed, files)
    good = killed.total("survived") == killed.total("kills") and not files.total("wrong")
    whole = killed.total("kills") >= 100 and files.total("inputs") >= 10_000
    output = o.output or (ROOT / "results" / "faults.json" if whole else None)
    if output:
        about = {"summary": summary, "seed": o.seed, "seconds": round(time.perf_counter() - clock)}
        about |= runtime.describe_device() | {"kills": killed, "surroundings": elsewhere, "inputs": files}
        with packs.atomic(output) as temporary: temporary.write_text(json.dumps(about, indent=1) + "\n")
    if good: shutil.rmtree(work)
    print(summary, flush=True)
    sys.exit(not good)


if __name__ == "__main__": main()
