"""The campaign against the project: runs killed at every point, and thousands of files that are not what they should be.

`make faults` runs all of it and writes results/faults.json; `python tests/faults.py --kills 5 --inputs 100 --pipeline 0` is a taste. It ends with the line
`faults: kills S/K survived, inputs R refused, A accepted unchanged, W wrong` and fails unless S = K and W = 0.
To try another kind of file, add a `Format` to FORMATS: a name, a function that makes the bytes of a sound file, and one that reads a file and returns a digest of its content."""
import argparse, copy, io, json, os, pickle, random, resource, shutil, signal, sys, tempfile, time, zipfile
from pathlib import Path
from typing import Callable, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the runs are forked from this process, which must have no other threads
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import numpy as np, torch, torch._dynamo, yaml  # torch imports _dynamo with the first optimiser: once here instead of in every run
import stanet.episodes, stanet.experiment as experiment, stanet.parameters as parameters, stanet.network as network, stanet.packs as packs, stanet.sources as sources, stanet.training as training
from accelerate import Accelerator
from PIL import Image
from stanet.glyphs import glyphs

KEY = "glyphs-5w1s-stanet3"
FILES = ("model.safetensors", "history.csv", "tasks.npz", "card.json", "metrics.json")
REPEATED = tuple(f for f in FILES if f != "card.json")  # a card holds the time that the run took


# ---------------------------------------------------------------- kills

def small(params):
    "Make the runs on glyphs so small that one takes a second."
    params["recipes"]["quick"].update(steps=40, tasks=2, mix=2, query=2)
    params["task_sets"]["glyphs-5w1s"].update(n=120, query=3)
    for key, run in params["runs"].items():
        if key.startswith("glyphs-"): run.update(width=8, d_k=8, d_v=8)


def make_project(folder: Path):
    "A folder with params.yaml, the reports' notebooks and a small pack: what a run needs."
    shutil.copytree(ROOT / "nbs" / "results", folder / "nbs" / "results")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    small(params)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    shutil.copytree(ROOT / "packs", folder / "packs", ignore=shutil.ignore_patterns("glyphs*"))
    packs.save_pack(glyphs(classes=40, per_class=8), folder / "packs" / "glyphs.safetensors")


def whole_run():
    "What the training notebook does: fit, measure, record. A row of the history every 5 steps and a state with each."
    training.train.__defaults__ = tuple(0.0 if d == 30.0 else 5 if d == 50 else d for d in training.train.__defaults__)
    run = parameters.find_run(KEY)
    pack = experiment.load_data(run.pack)
    net, history, trained = experiment.fit(run, pack)
    tasks = experiment.task_set(run.test, parameters.load_params().task_sets[run.test], pack)
    correct, _, _ = experiment.measure(run, net, pack, tasks)
    experiment.record(run, net, history, trained, correct, tasks, pack)


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


def half_written(handle):
    "The file is cut in the middle, as if the process had ended while it wrote."
    path = os.readlink(f"/proc/self/fd/{handle}") if Path("/proc/self/fd").exists() else None
    if path: os.truncate(path, os.path.getsize(path) // 2)
    die()


def writes(name): return lambda handle, *_: Path("/proc/self/fd").exists() and Path(os.readlink(f"/proc/self/fd/{handle}")).name.startswith(name)
def moves(name): return lambda source, *_: Path(source).name.startswith(name)


POINTS = {
    "drawing tasks": lambda n: before(stanet.episodes.Episodes, "batch", n),
    "augmenting images": lambda n: before(training, "augment", n),
    "in the backward pass": lambda n: before(Accelerator, "backward", n, after=True),
    "between step and average": lambda n: before(training.State, "advance", n),
    "adding to the history": lambda n: before(training.State, "close_window", n, after=True),
    "collecting a state": lambda n: before(training.State, "tensors", n, after=True),
    "writing a state": lambda n: before(os, "fsync", n, half_written, writes("step-")),
    "renaming a state": lambda n: before(os, "replace", n, die, moves("step-")),
    "removing an old state": lambda n: before(Path, "unlink", n, die, moves("step-")),
    "a state just written": lambda n: before(os, "replace", n, die, moves("step-"), after=True),
    "restoring a state": lambda n: before(training.State, "restore", 1, after=True),
    "writing the task set": lambda n: before(os, "fsync", 1, half_written, writes("glyphs-5w1s.safetensors")),
    "embedding test images": lambda n: before(experiment, "embed_images", 1),
    "scoring test tasks": lambda n: before(experiment, "score", 1, after=True),
    **{f"writing {f}": lambda n, f=f: before(os, "fsync", 1, half_written, writes(f)) for f in FILES},
    **{f"{f} just written": lambda n, f=f: before(os, "replace", 1, die, moves(f), after=True) for f in FILES},
}
ANY = "any moment"


def spawn(folder: Path, point=None, nth=1) -> int:
    "Fork a process that does the whole run in `folder`, to be killed at `point`; returns its id."
    if (pid := os.fork()): return pid
    try:
        os.chdir(folder)
        log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1); os.dup2(log, 2)
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


def results(folder): return {f: (folder / "runs" / KEY / f).read_bytes() if (folder / "runs" / KEY / f).is_file() else None for f in REPEATED}


def left_over(folder):  # files that no run that was left alone has
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.endswith(".partial") or p.name.startswith(".tmp")] + [p.name for p in (folder / "runs" / KEY).iterdir() if p.name not in (*FILES, "train.ipynb")]


class Count(dict):
    "Counts by name and outcome."
    def add(self, name, **outcomes):
        row = self.setdefault(name, {})
        for k, n in outcomes.items(): row[k] = row.get(k, 0) + n

    def total(self, outcome): return sum(row.get(outcome, 0) for row in self.values())


def kills(n: int, dice: random.Random, work: Path, say=print) -> Count:
    "Kill a small run `n` times, up to three times in a row, and compare what it leaves in the end with an uninterrupted run."
    count = Count()
    make_project(work / "fresh")
    shutil.copytree(work / "fresh", work / "whole")
    clock = time.perf_counter()
    assert ended(spawn(work / "whole")) == 0, (work / "whole.log").read_text()[-3000:]
    length, expected = time.perf_counter() - clock, results(work / "whole")
    order = []
    while count.total("kills") < n:
        folder, killed = work / "killed", []
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(work / "fresh", folder)
        (work / "killed.log").unlink(missing_ok=True)
        for _ in range(min(dice.choice((1, 1, 2, 2, 3)), n - count.total("kills"))):
            if not order: order = dice.sample([*POINTS, *[ANY] * (len(POINTS) // 3)], len(POINTS) + len(POINTS) // 3)
            point = order.pop()
            pid = spawn(folder, None if point == ANY else point, dice.randint(1, 6))
            if point == ANY:
                time.sleep(dice.random() * length)
                os.kill(pid, signal.SIGKILL)  # the process is still ours, also when it has ended
            if ended(pid) == -signal.SIGKILL: killed.append(point)
        good = ended(spawn(folder)) == 0 and results(folder) == expected and not left_over(folder)
        if not good: say(f"not survived: {' and then '.join(killed)}; left over {left_over(folder)}, different {[f for f, b in results(folder).items() if b != expected[f]]}\n{(work / 'killed.log').read_text()[-1500:]}")
        for point in killed: count.add(point, kills=1, survived=int(good))
    return count


def pipeline_kills(n: int, dice: random.Random, work: Path, say=print) -> Count:
    "Kill a real `dvc repro` of a small run `n` times, with its whole group of processes or all that it started, and compare."
    import psutil, subprocess
    from conftest import BIN, clone, edit_params, run
    count, name, fresh = Count(), "`dvc repro` at any moment", clone(work / "pipeline")
    edit_params(fresh, small)
    run("dvc", "repro", "glyphs", "tasks@glyphs-5w1s", cwd=fresh)
    def repro(folder): return subprocess.Popen([BIN / "dvc", "repro", f"train@{KEY}"], cwd=folder, env=env(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    def env(folder): return os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    def status(folder): return run("git", "status", "--porcelain", "-uall", cwd=folder).stdout
    whole = work / "pipeline whole"
    shutil.copytree(fresh, whole)
    clock, process = time.perf_counter(), repro(whole)
    said = process.communicate()[0]
    assert process.returncode == 0, said[-3000:]
    length, expected, files = time.perf_counter() - clock, results(whole), status(whole)
    while count.total("kills") < n:
        folder = work / "pipeline killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh, folder)
        process = repro(folder)
        time.sleep(length * (0.2 + 0.8 * dice.random()))
        everything = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        if not everything: continue
        if dice.random() < 0.5:
            for p in everything: p.kill()
        else: os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        again = repro(folder)
        said = again.communicate()[0]
        good = again.returncode == 0 and results(folder) == expected and status(folder) == files and not left_over(folder)
        if not good: say(f"not survived: {name}; left over {left_over(folder)}\n{said[-2000:]}")
        count.add(name, kills=1, survived=int(good))
    return count


# ---------------------------------------------------------------- changed files

class Format(NamedTuple):
    "A kind of file: how to make a sound one, and how the project reads it."
    name: str  # of the file too
    make: Callable[[], bytes]  # the bytes of a sound file
    load: Callable[[Path], str]  # a digest of all that was read; what a user did wrong is a ValueError or an OSError that names the file
    change: Callable | None = None  # (bytes, dice) -> changed bytes and whether they must be refused; `changed` by default


def written(write, name="file") -> bytes:
    "The bytes that `write(path)` writes."
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def small_pack():
    "A pack with everything that a pack can hold."
    dice = torch.Generator().manual_seed(0)
    return packs.Pack(torch.randint(0, 256, (24, 5, 5, 3), generator=dice, dtype=torch.uint8), torch.arange(6).repeat_interleave(4), [f"class {i} é" for i in range(6)], ["even", "odd"] * 3,
                      torch.randint(0, 5, (24, 4), generator=dice).short(), "small")


def small_net():
    torch.manual_seed(0)
    return network.build(dict(backbone="Conv64", channels=3, width=4, pools=2, way=3, layers=2, d_k=4, d_v=4, attention="SpatialAttention", n_semantic=6, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2], sigma=0.25, size=16))


def load_weights(path):
    net = network.load_network(path)
    return packs.digest(*(t for _, t in sorted(net.state_dict().items())), text=json.dumps(net.about, sort_keys=True))


def small_tasks(): return stanet.episodes.draw_task_set(small_pack().labels, 3, 1, 2, 10)


STATES = [({"net.w": torch.arange(12.0) * step, "torch": torch.arange(20, dtype=torch.uint8)}, {"history": [{"step": step, "loss": 1.0}], "seconds": 1.0, "devices": {}}) for step in (10, 20)]


def state_file() -> tuple[str, bytes]:
    "Name and bytes of the newer state."
    with tempfile.TemporaryDirectory() as folder:
        training.Checkpoints(folder).save(20, *STATES[1])
        path, = Path(folder).iterdir()
        return path.name, path.read_bytes()


def load_state(path):
    "Put the bytes where the newest state should be, with a sound one before it. A state that is passed over counts as refused."
    with tempfile.TemporaryDirectory() as folder:
        states = training.Checkpoints(folder)
        states.save(10, *STATES[0])
        shutil.copy(path, Path(folder) / state_file()[0])
        tensors, about = states.latest()
        sha = packs.digest(*(t for _, t in sorted(tensors.items())), text=json.dumps(about, sort_keys=True))
        if sha == packs.digest(*(t for _, t in sorted(STATES[0][0].items())), text=json.dumps(STATES[0][1] | {"step": 10}, sort_keys=True)): raise ValueError(f"{path}: passed over, the state before it is used")
        return sha


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
    header = json.dumps({"__metadata__": {"pack": "{}", "tasks": "[]", "stanet": "null", "state": "3"}, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return dice.choice([
        lambda: b"", lambda: b"\0" * dice.randint(1, 5000), lambda: dice.randbytes(dice.randint(1, 5000)), lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        lambda: pickle.dumps(Poison()), lambda: zipped("archive/data.pkl", pickle.dumps(Poison())), lambda: zipped("../outside.txt", "out"),
        lambda: b"null", lambda: b"[" * 100_000, lambda: b"\x89PNG\r\n\x1a\n" + dice.randbytes(100), lambda: (2 ** 63 - 1).to_bytes(8, "little") + b"{}", lambda: (10 ** 8).to_bytes(8, "little") + b"{" * 100,
        lambda: len(header).to_bytes(8, "little") + header + b"\0" * 4, lambda: dice.choice(FORMATS).make(),
    ])()


def changed(data: bytes, dice: random.Random) -> tuple[bytes, bool | None]:
    "`data` changed somewhere, half of the time in its first part, where a header is."
    place = lambda: dice.randrange(min(len(data), 600) if dice.random() < 0.5 else len(data))
    def put(i, new, gone=None): return data[:i] + new + data[i + (len(new) if gone is None else gone):]
    i, j = place(), place()
    return dice.choice([
        lambda: data[:i], lambda: data[:-dice.randint(1, 9)], lambda: put(i, bytes([data[i] ^ 1 << dice.randrange(8)])), lambda: put(i, bytes([data[i] ^ 1 << dice.randrange(8)])),
        lambda: put(i, dice.randbytes(dice.randint(1, 16))), lambda: put(i, dice.randbytes(dice.randint(1, 16)), 0), lambda: put(i, b"", dice.randint(1, 16)), lambda: put(i, str(dice.randint(0, 99)).encode()),
        lambda: put(i, b"\0" * dice.randint(1, 64)), lambda: put(i, data[j:j + 32]), lambda: data + dice.randbytes(dice.randint(1, 64)), lambda: data[:i] + data[i:j] + data[i:], lambda: data[i:] + data[:i],
        lambda: foreign(dice),
    ])(), None


NONSENSE = [[], {"a": 1}, None, "no such thing", -1, float("nan"), float("inf"), "5", [1, 2]]


def places(tree, prefix=()):
    "The paths of all fields in nested mappings."
    for k, v in tree.items():
        yield (*prefix, k)
        if isinstance(v, dict): yield from places(v, (*prefix, k))


def change_yaml(data: bytes, dice: random.Random) -> tuple[bytes, bool | None]:
    "params.yaml with a wrong, unknown, missing or repeated field (must be refused), in other words (must not), or with changed bytes."
    text, kind = data.decode(), dice.choice(["value", "value", "unknown", "typo", "gone", "twice", "words", "bytes", "bytes", "shape"])
    tree = copy.deepcopy(yaml.safe_load(text))
    if kind == "bytes": return changed(data, dice)
    if kind == "words":
        lines = text.splitlines()
        lines.insert(dice.choice([i for i, line in enumerate(lines) if line and not line.startswith(" ")]), dice.choice(["# a comment", "", "   # indented: [", "#" * 100]))
        return dice.choice([lambda: "\n".join(lines) + "\n", lambda: yaml.safe_dump(tree, sort_keys=dice.random() < 0.5, default_flow_style=dice.random() < 0.3), lambda: text.replace("\n", "\r\n"), lambda: json.dumps(tree)])().encode(), False
    path = list(dice.choice([p for p in places(tree) if kind != "typo" or len(p) != 2]))  # names of entries are free
    parent = tree
    for k in path[:-1]: parent = parent[k]
    last = path[-1]
    if kind == "value": parent[last] = dice.choice([v for v in NONSENSE if not isinstance(v, type(parent[last])) or v in ("no such thing", -1) or v != v] if not isinstance(parent[last], (dict, list)) else [None, "no such thing", 3, [[]], {"A b": {}}])
    elif kind == "unknown": (parent[last] if isinstance(parent[last], dict) else parent)[dice.choice(["layer", "Recipe", "learning-rate", "x" * 50, "é"])] = dice.choice([1, "a", None, {}])
    elif kind == "typo": parent[last[:-1] + ("x" if last[-1] != "x" else "y")] = parent.pop(last)
    elif kind == "gone": del tree[dice.choice(["recipes", "task_sets", "runs", "cells", "reports"])]
    elif kind == "shape": tree = dice.choice([[tree], "text", 3, None, {"params": tree}, tree | {"runs": list(tree["runs"].values())}, tree | {"reports": {}}, tree | {"reports": tree["reports"] * 2}])
    out = yaml.safe_dump(tree, sort_keys=False)
    if kind == "twice":
        lines = [line for line in out.splitlines() if ":" in line and not line.strip().startswith("-")]
        line = dice.choice(lines)
        out = out.replace(line + "\n", line + "\n" + (line if not line.endswith(":") else line + " {}") + "\n", 1) if line.count(" ") == len(line) - len(line.lstrip()) + 1 else out + "runs: {}\n"
    return out.encode(), True


def images(n):
    "`n` small pictures."
    return [Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)) for i in range(n)]


def encoded(kind):
    data = io.BytesIO()
    images(1)[0].save(data, kind)
    return data.getvalue()


def cifar_part(part):
    "One of the three files of a CIFAR-100 with four classes of two images."
    if part == "meta": return pickle.dumps({"fine_label_names": list("abcd"), "coarse_label_names": ["x", "y"]}, protocol=2)
    first = part == "test"
    return pickle.dumps({b"data": np.random.default_rng(first).integers(0, 256, (4, 3072), dtype=np.uint8), b"fine_labels": [0, 1, 2, 3], b"coarse_labels": [0, 0, 1, 1], b"filenames": [f"{c}{int(first)}.png".encode() for c in "abcd"]}, protocol=2)


def mini_list(part): return ("filename,label\n" + "".join(f"n{c:08d}{i:08d}.jpg,n{c:08d}\n" for c in [("train", "val", "test").index(part) + 1] for i in (1, 2, 3))).encode()


def mini_cache(part):
    number = ("train", "val", "test").index(part)
    return pickle.dumps({"image_data": np.random.default_rng(number).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8), "class_dict": {f"n{number}": [0, 1], f"m{number}": [2, 3]}}, protocol=2)


RECORDED = {}  # name -> digest of the pack that was read first, from a sound file


def recorded(name, pack):
    "The digest of a pack, if it is the recorded one; else what `stanet data verify` says."
    sha = packs.pack_digest(pack)
    if sha != RECORDED.setdefault(name, sha): raise ValueError(f"{name}: the pack's hash isn't the recorded one")
    return sha


def load_source(read, lay):
    "A reader for one file of a source: `lay(folder, path)` puts the file at `path` and sound ones into a folder, which `read` reads."
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
    names = [line.split(",")[0] for part in ("train", "val", "test") for line in mini_list(part).decode().splitlines()[1:]]
    for name, image in zip(names, images(9)): image.save(tree / "images" / name)


def lay_class(tree, path):
    for c in "ab": (tree / c).mkdir()
    for c, image in zip("aabb", images(4)): image.save(tree / c / f"{len(list((tree / c).iterdir()))}.bmp")
    shutil.copy(path, tree / "a")


FORMATS = [
    Format("pack.safetensors", lambda: written(lambda p: packs.save_pack(small_pack(), p)), lambda p: packs.pack_digest(packs.load_pack(p))),
    Format("tasks.safetensors", lambda: written(lambda p: stanet.episodes.save_tasks(small_tasks(), p, "a" * 64)), lambda p: stanet.episodes.tasks_digest(stanet.episodes.load_tasks(p, "a" * 64))),
    Format("model.safetensors", lambda: written(lambda p: network.save_network(small_net(), p, key="small")), load_weights),
    Format("state.safetensors", lambda: state_file()[1], load_state),
    Format("cifar-100-python", lambda: cifar_part("train"), load_source(lambda f: sources.read_cifar100(f, {"classes": 4, "parents": 2, "images": 2}), lay_cifar)),
    Format("mini-imagenet-cache-train.pkl", lambda: mini_cache("train"), load_source(lambda f: sources.read_mini(f, 12, {"classes": 6, "images": 2}), lay_cache)),
    Format("train.csv", lambda: mini_list("train"), load_source(lambda f: sources.read_mini(f, 12, {"classes": 3, "images": 3}), lay_mini)),
    Format("image.png", lambda: encoded("PNG"), load_source(lambda f: sources.read_folder(f, 12), lay_class)),
    Format("image.jpg", lambda: encoded("JPEG"), load_source(lambda f: sources.read_folder(f, 12), lay_class)),
    Format("params.yaml", lambda: (ROOT / "params.yaml").read_bytes(), load_yaml, change_yaml),
]


def same_values(text) -> bool:
    "Whether another YAML reader, DVC's, finds in the text what the project found, with no key twice."
    from ruamel.yaml import YAML
    try: return YAML(typ="safe", pure=True).load(text) == parameters.read_yaml(text)[0]
    except Exception: return False


def outcome(form: Format, data: bytes, must_refuse, sound: str, folder: Path) -> str:
    "'refused', 'accepted', 'edit' (a changed value of params.yaml that is a right one too) or what is wrong."
    path = folder / form.name
    path.write_bytes(data)
    try: got = form.load(path)
    except (ValueError, OSError, ArithmeticError, SyntaxError) as error:  # what the command answers in one line
        lines = str(error).splitlines()
        if form.name == "params.yaml": return "refused" if must_refuse is not False and lines[0].startswith("params.yaml: ") and len(lines) > 1 else f"wrong: a sound file is refused, or without its name: {error}"
        return "refused" if len(lines) == 1 and form.name in lines[0] else f"wrong: not one line that names the file: {error}"
    except BaseException as error: return f"wrong: {type(error).__name__}: {error}"
    finally:
        if os.path.exists(os.environ["FAULTS_MARK"]): os.unlink(os.environ["FAULTS_MARK"]); return "wrong: code was run"
    if [p.name for p in folder.iterdir()] != [form.name]: return f"wrong: left {[p.name for p in folder.iterdir()]}"
    if must_refuse: return "wrong: accepted what must be refused"
    if got == sound: return "accepted"
    return "edit" if form.name == "params.yaml" and must_refuse is None and same_values(data.decode()) else "wrong: accepted with another content"


def in_a_process(jobs, work, seconds=120) -> list:
    "The outcomes of `jobs`, in a process of its own with limited memory and time; what it didn't come to is None."
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
    how = ended(pid)
    return found + [f"wrong: ended the process ({how})"] * (len(found) < len(jobs)) + [None] * (len(jobs) - len(found) - 1)


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
                count.add(form.name, inputs=1, refused=int(found == "refused"), accepted=int(found == "accepted"), wrong=int(found.startswith("wrong")))
                if found.startswith("wrong"):
                    kept = work / f"wrong-{count.total('wrong')}-{form.name}"
                    kept.write_bytes(job[1])
                    say(f"{form.name}: {found[:300]}; kept as {kept}")
        (folder / form.name).unlink(missing_ok=True)
    return count


# ---------------------------------------------------------------- all of it

def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=60, help="kills of small runs")
    options.add_argument("--pipeline", type=int, default=8, help="kills of a real `dvc repro` beside them")
    options.add_argument("--inputs", type=int, default=2500, help="changed files")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, help="where to write the counts; a campaign of at least 50 kills and 2,000 inputs writes results/faults.json")
    o = options.parse_args()
    torch.set_num_threads(1)
    clock, work = time.perf_counter(), Path(tempfile.mkdtemp(prefix="faults-"))
    os.chdir(ROOT)
    changed_files = inputs(o.inputs, random.Random(o.seed), work)
    print(f"inputs: {dict(changed_files)}", flush=True)
    killed = kills(o.kills, random.Random(o.seed), work) if o.kills else Count()
    print(f"kills: {dict(killed)}", flush=True)
    if o.pipeline: killed |= pipeline_kills(o.pipeline, random.Random(o.seed), work)
    killed = Count(sorted(killed.items()))
    summary = f"faults: kills {killed.total('survived')}/{killed.total('kills')} survived, inputs {changed_files.total('refused')} refused, {changed_files.total('accepted')} accepted unchanged, {changed_files.total('wrong')} wrong"
    good = killed.total("survived") == killed.total("kills") and not changed_files.total("wrong")
    output = o.output or (ROOT / "results" / "faults.json" if killed.total("kills") >= 50 and changed_files.total("inputs") >= 2000 else None)
    if output:
        about = {"summary": summary, "seed": o.seed, "seconds": round(time.perf_counter() - clock), **training.describe_device(), "kills": killed, "inputs": changed_files}
        with packs.atomic(output) as temporary: temporary.write_text(json.dumps(about, indent=1) + "\n")
    if good: shutil.rmtree(work)
    print(summary, flush=True)
    sys.exit(not good)


if __name__ == "__main__": main()
