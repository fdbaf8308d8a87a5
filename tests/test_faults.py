"""What real machines and people do to a run: a cross-section of `make faults`,
and what needs a disk, a kernel or two processes."""
import ast, errno, json, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pandas as pd, pytest, torch, yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
import faults
import stanet
from stanet import experiment, fingerprints, parameters, packs, runtime, training
from stanet.embedding import Conv64
from stanet.method import Images, Method, build, find_method, known_methods, gather_maps
from stanet.weights import save_network
from conftest import BIN, ROOT, clone_without_lock, edit_params, leave_only, run

KEY, TEST = faults.KEY, faults.TEST
CONFIG = dict(method="stanet", options=dict(layers=2, d_k=8, d_v=8), backbone="Conv64", channels=1, width=8,
              pools=2, n_semantic=16, mean=[0.5], std=[0.3])
OPTIONS = dict(steps=20, tasks=4, query=3, one_query=False, classes="uniform", lr=3e-3, schedule="cosine",
               decay_head=False, ema_decay=0.9, shift=0.1, precision="float32")
IMAGES = dict(sampler="images", images=24, optimiser="sgd")


def unshared(value):
    "A copy in which nothing is shared, as YAML's anchors share it."
    if isinstance(value, dict): return {key: unshared(part) for key, part in value.items()}
    return [unshared(part) for part in value] if isinstance(value, list) else value


def toy():
    "Sixteen classes of ten noisy images."
    dice = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 256, (16, 1, 12, 12, 1), generator=dice)
    noise = torch.randint(-60, 61, (16, 10, 12, 12, 1), generator=dice)
    images = (prototypes + noise).clamp(0, 255).byte().flatten(0, 1)
    labels = torch.arange(16).repeat_interleave(10)
    return training.TrainingData(images, labels, labels)


class Classifier(Method):
    "Learns the training classes from images without tasks."
    stages = ("classes",)

    def setup(self): self.W = nn.Linear(self.backbone.n_ch, self.classes)

    def forward(self, batch):
        logits = self.W(self.embed(batch.images).mean((-2, -1)))
        return {"loss": nn.functional.cross_entropy(logits, batch.classes)}


def classifier():
    torch.manual_seed(0)
    return Classifier(Conv64(channels=1, width=8, pools=2), classes=16, images=Images(mean=[0.5], std=[0.3]))


def toy_net(config=CONFIG):
    torch.manual_seed(0)
    return build(config)


def toy_run(folder, net=None, save_seconds=0.0, **options):
    pace, recipe = training.Pace(every=5, save_seconds=save_seconds), training.Recipe(**OPTIONS | options)
    net = net or toy_net()
    return training.train(net, toy(), recipe, folder, pace=pace)


def same(net, other): return all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return toy_run(tmp_path_factory.mktemp("whole"))


# -- the campaign, and any change of a file

def test_cross_section_of_the_campaign(tmp_path):
    output, sizes = tmp_path / "faults.json", ("--kills", 6, "--inputs", 150, "--pipeline", 0, "--seed", 2)
    said = run(sys.executable, "tests/faults.py", *sizes, "--output", output, cwd=ROOT).stdout.splitlines()
    expected = r"faults: kills 6/6 survived, inputs (\d+) refused, (\d+) accepted unchanged, 0 wrong"
    refused, accepted = map(int, re.fullmatch(expected, said[-1]).groups())
    assert refused + accepted == 150 and refused > 100
    assert json.loads(output.read_text())["summary"] == said[-1]


def test_campaign_notices_what_is_wrong(tmp_path):
    def careless(path): return packs.digest(text=path.read_bytes()[:40].hex())
    form = faults.Format("careless.bin", lambda: bytes(range(200)), careless)
    count = faults.inputs(40, random.Random(0), tmp_path, say=lambda *_: None, formats=[form])
    assert count.total("wrong") > 5 and count.total("inputs") == 40


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_any_torn_state_is_passed_over(tmp_path, place, bit, cut):
    name, data = faults.state_file()
    i = int(place * len(data))
    folder = tmp_path / "states"
    shutil.rmtree(folder, ignore_errors=True)
    states = runtime.Checkpoints(folder)
    states.save(10, *faults.STATES[0])
    (folder / name).write_bytes(data[:i] if cut else data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1:])
    assert states.latest()[1]["step"] == 10 and not (folder / name).exists()
    (folder / name).write_bytes(data)
    assert states.latest()[1]["step"] == 20


@pytest.fixture
def small_project(tmp_path, monkeypatch):
    "A folder with a small pack of glyphs, which is the working directory; the pack."
    faults.make_project(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return experiment.load_data("glyphs")


def code_with(folder, old, new):
    "`training_code`, of a copy of the package in whose training.py `old` reads `new`."
    copy = folder / "stanet"
    shutil.copytree(Path(stanet.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / "training.py").read_text()
    assert text.count(old) == 1
    (copy / "training.py").write_text(text.replace(old, new))
    return lambda run: fingerprints.training_code(run, fingerprints.Code(copy).fingerprint)


def test_other_parameters_code_or_data_have_another_state(tmp_path, monkeypatch, small_project):
    run, pack = parameters.find_run(KEY), small_project
    here = experiment.scratch_folder(run, pack)
    runtime.Checkpoints(here).save(40, *faults.STATES[0])
    assert runtime.Checkpoints(experiment.scratch_folder(run, pack)).latest() is not None
    def with_fields(**fields): return experiment.scratch_folder(run.model_copy(update=fields), pack)
    pixel = pack.images.clone()
    pixel[0, 0, 0, 0] ^= 1
    other_pack = packs.Pack(pixel, pack.labels, pack.classes, pack.parents, pack.boxes, pack.name)
    others = [with_fields(lr=run.lr * 2), with_fields(d_v=16), with_fields(shot=2)]
    others.append(experiment.scratch_folder(run, other_pack))
    for name, old, new, changes in (
        ("rule", "return net(batch)", "return net(batch) | {}", True),
        ("comment", "return net(batch)", "return net(batch)  # the losses", False),
    ):
        monkeypatch.setattr(experiment, "training_code", code_with(tmp_path / name, old, new))
        there = experiment.scratch_folder(run, pack)
        if changes: others.append(there)
        else: assert there == here
    assert len({here, *others}) == 6
    assert all(runtime.Checkpoints(f).latest() is None for f in others)


# -- parameters

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dice=st.randoms(use_true_random=True))
def test_no_wrong_parameters_pass(tmp_path_factory, dice):
    folder = tmp_path_factory.mktemp("params")
    os.environ["FAULTS_MARK"] = str(folder.parent / "mark")
    form = faults.FORMATS[-1]
    assert form.name == "params.yaml"
    usual = form.make()
    (folder / form.name).write_bytes(usual)
    sound = form.load(folder / form.name)
    data, must = faults.change_yaml(usual, dice)
    if data == usual: return
    assert faults.outcome(form, data, must, sound, folder) in ("refused", "accepted", "edit"), data


ONE, THREE = "omniglot-5w1s-stanet1", "omniglot-5w1s-stanet3"


def run_with(**fields): return lambda p: p["runs"][ONE].update(fields)
def set_with(**fields): return lambda p: p["task_sets"]["omniglot-5w1s"].update(fields)
def network_with(**fields): return lambda p: p["networks"]["glyphs"].update(fields)
def more(section, name, **fields): return lambda p: p[section].update({name: fields})


def glyphs_run(**fields):
    "A run `extra` on glyphs, of the quick recipe."
    return more("runs", "extra", **dict(recipe="quick", pack="glyphs", split="glyphs") | fields)


def row_with(**fields):
    "The first three rows of the report quickstart, and a fourth one."
    label = dict(method="STANet", backbone="Conv64", dataset="glyphs", variant="extra")
    usual = label | dict(task_set=TEST.task_set)
    def change(p):
        report = p["reports"]["quickstart"]
        report["rows"] = report["rows"][:3] + [usual | fields]
    return change


def both(*changes):
    def change(p):
        for c in changes: c(p)
    return change


SEVEN = more("task_sets", "glyphs-7w1s", pack="glyphs", split="glyphs", way=7)
ROW = "reports.quickstart.row 4"
NO_FIT = {
    "task_sets.omniglot-5w1s.way: 424, but there are 423 test classes": set_with(way=424),
    f"runs.{ONE}.way: 4801, but there are 4800 train classes": run_with(way=4801),
    f"runs.{ONE}.shot: shot and queries make 21 images a class, but the smallest train class has 20":
        run_with(query=20),
    "task_sets.omniglot-5w1s.shot: shot and queries make 21 images a class": set_with(query=20),
    f"runs.{ONE}.tasks: 1000 tasks of 5 different classes need 5000, but there are 4800 train classes":
        run_with(tasks=1000),
    f"runs.{ONE}.recipe: there is no such recipe; there are paper, ": run_with(recipe="slow"),
    f"runs.{ONE}.backbone: there is no 'ResNet99'": run_with(backbone="ResNet99"),
    f"runs.{ONE}.attention: there is no 'Soft'": run_with(attention="Soft"),
    f"runs.{ONE}: its network can't be built: TaskAttention": run_with(attention="TaskAttention"),
    "task_sets.omniglot-5w1s.pack: there is no pack 'imagenet'": set_with(pack="imagenet"),
    "recipes.choice.momentums: Extra inputs are not permitted; do you mean momentum?":
        lambda p: p["recipes"]["choice"].update(momentums=0.9),
    "networks.glyphs.depth: Extra inputs are not permitted": network_with(depth=3),
    "networks.glyphs.pack: there is no pack 'letters'": network_with(pack="letters"),
    "networks.glyphs.attention: there is no 'Soft'": network_with(attention="Soft"),
    "runs: a mapping is expected (found [])": lambda p: p.update(runs=[]),
    "figures: there is no such section": lambda p: p.update(figures=[]),
    "cells: there is no such section": lambda p: p.update(cells={}),
    "reports: a mapping is expected (found ['table1'])": lambda p: p.update(reports=["table1"]),
    "runs.a b; rm: a name is made of lowercase letters": more("runs", "a b; rm"),
    "runs.a-on-b: -on-, -inductive and -nearest are parts of the names of tests":
        more("runs", "a-on-b", recipe="quick"),
    f"runs.{ONE}.key: the name of the entry is the key": run_with(key="other"),
    f"runs.{ONE}.earlier: the recipes of all stages are named in recipe": run_with(earlier={}),
    f"runs.{ONE}.steps: Input should be a valid integer (found True)": run_with(steps=True, lr=float("inf")),
    f"runs.{ONE}.lr: Input should be a finite number (found inf)": run_with(steps=True, lr=float("inf")),
    f"runs.{ONE}: decoupled decay is AdamW's, and the optimiser is sgd":
        run_with(optimiser="sgd", decoupled=True),
    # methods
    f"runs.{ONE}.method: there is no method 'transformer'; there are ": run_with(method="transformer"),
    f"runs.{ONE}.method: a method is named by its module": run_with(method="../../setup"),
    f"runs.{ONE}.inner_lr: Extra inputs are not permitted; it is an option of maml (found 0.4)":
        run_with(inner_lr=0.4),
    "runs.extra.layers: Extra inputs are not permitted; it is an option of gnn, stanet (found 1)":
        glyphs_run(method="protonet", layers=1),
    "runs.extra.inner_lr: Input should be greater than 0 (found -1.0)":
        glyphs_run(method="maml", inner_lr=-1.0),
    # stages
    f"runs.{ONE}.recipe.classes: there is no such stage; the method has meta":
        run_with(recipe={"meta": "ours-omniglot", "classes": "paper"}),
    f"runs.{ONE}.recipe: the stage meta has no recipe": run_with(recipe={"classes": "paper"}),
    # beginning from weights
    f"runs.{ONE}.start: a run can't begin from itself": run_with(start=ONE),
    f"runs.{ONE}.start: there is no run '{ONE}x'; do you mean {ONE}?": run_with(start=f"{ONE}x"),
    f"runs.{ONE}.start: {ONE} from {THREE} from {ONE} goes in a circle":
        both(run_with(start=THREE), lambda p: p["runs"][THREE].update(start=ONE)),
    f"runs.extra.start: the weights of {KEY} don't fit: W_o.weight is (5, 96) float32 and should be (5, 64)":
        glyphs_run(width=24, pools=3, layers=2, d_k=32, d_v=32, start=KEY),
    # entries with `for`
    "runs.x-b: duplicate, made again by 'x-{a}'":
        more("runs", "x-{a}", recipe="quick", **{"for": {"a": ["b", "b"]}}),
    "runs.x-{a}: {a} has no values in its for": more("runs", "x-{a}", recipe="quick", **{"for": {"b": [1]}}),
    "runs.x-{a}.for.a: a list of values is expected (found 1)":
        more("runs", "x-{a}", recipe="quick", **{"for": {"a": 1}}),
    "runs.x-{a}: a name is made of lowercase letters": more("runs", "x-{a}", recipe="quick"),
    # reports
    "reports.figure9: there is no notebook nbs/results/figure9.ipynb": more("reports", "figure9", rows=[]),
    f"{ROW}.run: there is no run 'maml'": row_with(run="maml"),
    f"{ROW}.task_set: there is no task set 'glyphs-5w2s'": row_with(run=KEY, task_set="glyphs-5w2s"),
    f"{ROW}.task_set: glyphs-7w1s has 7 ways, but runs.{KEY} is trained for 5 and stanet takes no other":
        both(SEVEN, row_with(run=KEY, task_set="glyphs-7w1s")),
    f"{ROW}.task_set: the images of {TEST.task_set} have 3 channels, those that runs.{ONE} is trained on 1":
        row_with(run=ONE),
    f"{ROW}.inductive: with stanet no answer depends on the other queries": row_with(run=KEY, inductive=True),
    f"{ROW}.run: duplicate, {TEST.name} is in row 1 already": row_with(run=KEY),
    f"{ROW}.variant: duplicate, it reads like row 1": row_with(run=None, variant="3 layers"),
    f"{ROW}.paper: Input should be less than or equal to 100 (found 101.0)": row_with(run=KEY, paper=101.0),
}


@pytest.fixture(scope="module")
def usual_params(): return (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize("answer, change", NO_FIT.items(), ids=lambda v: v[:60] if isinstance(v, str) else "")
def test_parameters_that_do_not_fit(answer, change, usual_params):
    params = unshared(yaml.safe_load(usual_params))  # without the sharing of YAML's anchors
    change(params)
    none, found = parameters.problems_of(params)
    assert none is None and any(line.startswith(answer) for line in found), found


@pytest.mark.parametrize("name", known_methods())
def test_every_method_has_a_run(name, usual_params):
    "Its options have names of their own, and with their defaults it takes a task of glyphs."
    params = unshared(yaml.safe_load(usual_params))
    recipe = dict.fromkeys(find_method(name).stages, "quick")
    larger_maps = {"relation": {"pools": 2, "relation_padding": True}}  # its module has pools of its own
    glyphs_run(method=name, width=8, recipe=recipe, **larger_maps.get(name, {}))(params)
    assert parameters.problems_of(params)[1] == []


def test_parameters_that_fit(usual_params):
    "What is refused above where it doesn't fit is allowed where it does."
    params = unshared(yaml.safe_load(usual_params))
    more("runs", "finer", **params["runs"][KEY] | dict(start=KEY, lr=1e-4))(params)
    both(SEVEN, glyphs_run(method="protonet", width=8), row_with(run="extra", task_set="glyphs-7w1s"))(params)
    assert parameters.problems_of(params)[1] == []
    both(glyphs_run(method="maml", width=8), row_with(run="extra", inductive=True))(params)
    assert parameters.problems_of(params)[1] == []


def counted(text: Path, part: str) -> int:
    "The classes of a part in a list of nbs/splits."
    return sum(line.startswith(f"{part}\t") for line in text.read_text().splitlines())


def test_extents_are_those_of_the_data():
    for name, splits in parameters.EXTENTS.items():
        for split, parts in splits.items():
            text = ROOT / "nbs" / "splits" / f"{split}.txt"
            for part, (n, _) in parts.items():
                if text.is_file(): assert counted(text, part) == n
            if parameters.pack_path(name).is_file(): assert parameters.extents(name, split) == parts


# -- weights that a run begins from, and those that a test reads

def recorded_run(pack, **fields):
    "The run KEY, recorded as it is before its first step, with the `fields` changed."
    run = parameters.find_run(KEY).model_copy(update=fields)
    net, _ = experiment.prepare(run, pack)
    experiment.record(run, net, pd.DataFrame({"step": [0], "loss": [0.0]}), {}, pack)
    return run, net


def files_in(folder): return {p for p in Path(folder).rglob("*") if p.is_file()}


def test_weights_of_another_width_are_no_start(small_project):
    run, _ = recorded_run(small_project)
    before = files_in(".")
    further = run.model_copy(update={"key": "further", "start": KEY, "width": 16})
    with pytest.raises(ValueError) as refused: experiment.fit(further, small_project)
    line = str(refused.value)
    assert line.startswith(f"start: the weights of {KEY} don't fit: ") and "\n" not in line
    assert "backbone.blocks.0.0.weight is (8, 3, 3, 3) float32 and should be (16, 3, 3, 3) float32" in line
    assert files_in(".") == before


def test_a_start_decides_the_state(small_project):
    "A run begins from the stored weights, and takes up no state of one that began from others, or from none."
    run, net = recorded_run(small_project)
    further = run.model_copy(update={"key": "further", "start": KEY, "steps": 1, "lr": 1e-9})
    alone = further.model_copy(update={"start": ""})
    def folder(of): return experiment.scratch_folder(of, small_project)
    first = folder(further)
    trained, _, _ = experiment.fit(further, small_project)
    stored = experiment.from_pretrained(KEY).state_dict()
    moved = {k for k, v in trained.named_parameters() if not torch.allclose(v, stored[k], atol=1e-6)}
    assert not moved
    recorded_run(small_project, seed=1)
    assert len({first, folder(further), folder(alone)}) == 3


def test_weights_that_the_card_does_not_name(small_project):
    run, net = recorded_run(small_project)
    params = parameters.load_params(thorough=False)
    experiment.run_test(TEST, params)
    tested = {p: p.read_bytes() for p in files_in(TEST.folder)}
    assert {p.name for p in tested} == {"answers.npz", "metrics.json"}
    with torch.no_grad(): net.W_o.weight.add_(1.0)
    save_network(net, Path("runs") / KEY / "model.safetensors", key=KEY)
    with pytest.raises(ValueError) as refused: experiment.run_test(TEST, params)
    assert str(refused.value).startswith(f"runs/{KEY}/model.safetensors is not the file that its card names;")
    assert {p: p.read_bytes() for p in files_in(TEST.folder)} == tested


# -- pickles

FORBIDDEN = {
    "torch.load", "pickle.load", "pickle.loads", "pd.read_pickle", "pandas.read_pickle", "joblib.load",
    "dill.load", "yaml.unsafe_load", "yaml.full_load",
}


def unpickles(node) -> bool:
    "Whether a piece of code reads what could run code."
    if isinstance(node, ast.Attribute): return ast.unparse(node) in FORBIDDEN
    if isinstance(node, ast.ImportFrom):
        return any(f"{node.module}.{a.name}" in FORBIDDEN for a in node.names)
    if not isinstance(node, ast.keyword): return False
    if node.arg == "allow_pickle": return ast.unparse(node.value) != "False"
    return node.arg == "weights_only"


def test_nothing_is_unpickled():
    paths = sorted((ROOT / "stanet").rglob("*.py"))
    assert {p.parent.name for p in paths} == {"stanet", "methods"}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not unpickles(node), f"{path}: {ast.unparse(node)}"


LOADS = ["torch.load(p)", "from pickle import load", "np.load(p, allow_pickle=True)", "f(weights_only=True)"]


@pytest.mark.parametrize("code", LOADS)
def test_unpickling_would_be_noticed(code): assert any(map(unpickles, ast.walk(ast.parse(code))))


# -- disks

@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A small disk: its folder, and functions that fill and free it. Where none can be mounted,
    writing to the disk fails as on a full one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    mounted = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
    full, usual = [], os.fsync
    def fsync(handle):
        if full: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        usual(handle)
    if not mounted: monkeypatch.setattr(os, "fsync", fsync)
    def fill():
        full.append(True)
        if not mounted: return
        with open(folder / "filler", "wb", buffering=0) as f:
            try:
                while True: f.write(b"\0" * 4096)
            except OSError: pass
    def free():
        full.clear()
        (folder / "filler").unlink(missing_ok=True)
    yield folder, fill, free
    if mounted: subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(disk, whole, monkeypatch):
    folder, fill, free = disk
    usual = training.State.close_window
    def close_window(state):
        if state.step == 15: fill()
        return usual(state)
    with monkeypatch.context() as patch:
        patch.setattr(training.State, "close_window", close_window)
        with pytest.raises(OSError) as refused: toy_run(folder / "states")
    line = str(refused.value)
    assert "\n" not in line and "step-00000015" in line
    assert line.endswith("can't be written (No space left on device); "
                         "make room and run the same command again, what was there before is unharmed")
    assert runtime.Checkpoints(folder / "states").latest()[1]["step"] == 10
    assert not list((folder / "states").glob(".*.partial"))
    free()
    net, history, _ = toy_run(folder / "states")
    assert same(net, whole[0]) and history.equals(whole[1])


def test_old_file_stays_when_the_disk_is_full(disk):
    folder, fill, free = disk
    path = folder / "small.safetensors"
    packs.save_pack(faults.small_pack(), path)
    fill()
    black = torch.zeros(3000, 20, 20, 3, dtype=torch.uint8)
    large = packs.Pack(black, torch.zeros(3000).long(), ["a"], ["a"])
    with pytest.raises(OSError, match="small.safetensors: can't be written"): packs.save_pack(large, path)
    free()
    assert packs.pack_digest(packs.load_pack(path)) == packs.pack_digest(faults.small_pack())
    assert [p.name for p in folder.iterdir()] == ["small.safetensors"]


# -- numbers

def test_nan_loss_names_step_and_tensor(tmp_path):
    said = r"step 5: the loss is nan, and \d+ of \d+ tensors are not finite, the first of them \w+"
    with pytest.raises(FloatingPointError, match=said): toy_run(tmp_path, toy_net(CONFIG | {"std": [0.0]}))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite(tmp_path, monkeypatch, value):
    usual = training.State.advance
    def advance(state, *values):
        usual(state, *values)
        if state.step == 10: state.net.layers[1].task.W_v.weight.data[0, 0] = value
    monkeypatch.setattr(training.State, "advance", advance)
    which = r"1 of \d+ tensors are not finite, the first of them layers.1.task.W_v.weight"
    said = rf"step 10: the loss is [\d.]+, and {which}"
    with pytest.raises(FloatingPointError, match=said): toy_run(tmp_path)
    assert runtime.Checkpoints(tmp_path).latest()[1]["step"] == 5


def gradients(threads, look_up):  # of maps that stand in many tasks
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dice = torch.Generator().manual_seed(0)
        maps = torch.randn(240, 64, 4, 4, generator=dice)
        maps = maps.to(memory_format=torch.channels_last).requires_grad_()
        index = torch.randint(240, (64, 20), generator=dice)
        (look_up(maps, index) * torch.randn(64, 20, 64, 4, 4, generator=dice)).sum().backward()
        return maps.grad
    finally: torch.set_num_threads(usual)


def test_gradients_are_the_same_every_time():
    found = {packs.digest(gradients(threads, gather_maps).contiguous()) for threads in (1, 2, 2, 2, 2, 4)}
    assert len(found) == 1
    assert torch.allclose(gradients(1, gather_maps), gradients(1, lambda maps, index: maps[index]))


def test_threads_agree(tmp_path, whole):
    before, losses, logits = torch.get_num_threads(), {}, {}
    images = toy().images.permute(0, 3, 1, 2).float() / 255
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            _, history, _ = toy_run(tmp_path / str(n))
            losses[n] = torch.tensor(history.loss)
            with torch.no_grad():
                maps = whole[0].embed(images)[None]
                logits[n] = whole[0].classify(maps[:, :50:10], torch.arange(5)[None], maps[:, 1:50])
    finally: torch.set_num_threads(before)
    for n in (2, 4):
        assert (losses[n] - losses[1]).abs().max() < 1e-3
        assert (logits[n] - logits[1]).abs().max() < 1e-4


# -- two processes of one training

class Seen(list):
    "The image numbers and the augmented images of each step of a training in this process."
    def __init__(self):
        self.usual, self.index = (training.load_images, training.augment), None
        training.load_images, training.augment = self.load_images, self.augment

    def load_images(self, images, index):
        self.index = index.tolist()
        return self.usual[0](images, index)

    def augment(self, *args):
        out = self.usual[1](*args)
        self.append([self.index, [packs.digest(image.contiguous()) for image in out]])
        return out

    def end(self): training.load_images, training.augment = self.usual


WORKER = """
import json, os, signal, sys, time
import torch, test_faults as t
from stanet import runtime, training
rank, folder = int(os.environ["RANK"]), sys.argv[1]
said, saves, stopped, seen = {}, [], None, t.Seen()
advance, save = training.State.advance, runtime.Checkpoints.save
def saved(self, step, *rest):
    time.sleep(1)  # the other process is ahead of the one that writes
    saves.append(step)
    save(self, step, *rest)
def pressed(self, *values):
    advance(self, *values)
    if rank == 1 and self.step == 7: os.kill(os.getpid(), signal.SIGINT)
runtime.Checkpoints.save = saved
whole, history, _ = t.toy_run(folder + "/whole")
said["tasks"] = list(seen)
training.State.advance = pressed
try: t.toy_run(folder + "/stopped", save_seconds=1e9)
except KeyboardInterrupt as stop: stopped = str(stop)
training.State.advance = advance
seen.clear()
again, other, _ = t.toy_run(folder + "/stopped")
said |= {"saves": list(saves), "stopped": stopped, "steps after": len(seen), "same": t.same(whole, again)}
said |= {"history": history.to_dict("list"), "same history": history.equals(other)}
seen.clear()
t.toy_run(folder + "/images", t.classifier(), save_seconds=1e9, **t.IMAGES)
said["images"] = list(seen)
open(f"{folder}/{rank}.json", "w").write(json.dumps(said))
import torch.distributed
torch.distributed.destroy_process_group()
"""


def assert_shared(seen, parts, groups):
    "Each of `groups` tasks (or images) in turn went to the next process, with the same augmentation."
    for (index, pixels), *of_process in zip(seen, *parts, strict=True):
        size = len(index) // groups
        for rank, (its_index, its_pixels) in enumerate(of_process):
            own = range(rank, groups, len(parts))
            assert its_index == [i for g in own for i in index[g * size:(g + 1) * size]]
            assert its_pixels == [p for g in own for p in pixels[g * size:(g + 1) * size]]


def test_two_processes_train_as_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    machine = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env = os.environ | machine | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "worker.py", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    seen = Seen()
    try:
        _, history, _ = toy_run(tmp_path / "one")
        tasks = list(seen)
        seen.clear()
        toy_run(tmp_path / "one image", classifier(), save_seconds=1e9, **IMAGES)
    finally: seen.end()
    assert len(tasks) == len(seen) == 20
    assert_shared(tasks, (first["tasks"], second["tasks"]), OPTIONS["tasks"])
    assert_shared(seen, (first["images"], second["images"]), IMAGES["images"])
    assert first["saves"] == [5, 10, 15, 20, 7, 10, 15, 20] and second["saves"] == []  # one process writes
    stopped = "stopped and saved at step 7 of 20; the same command or cell goes on from there"
    assert first["stopped"] == second["stopped"] == stopped
    assert first["steps after"] == second["steps after"] == 13  # both go on from there
    assert first["same"] and first["same history"] and first["history"] == second["history"]
    # batch normalisation sees half of the images, so not the same numbers
    assert abs(first["history"]["loss"][0] - history.loss[0]) < 0.2


# -- Ctrl-C, and the same thing twice at once, in a real pipeline

def started(folder, *command):
    paths = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    env = os.environ | paths | {"DVC_NO_ANALYTICS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def wait_for(process, what, seconds=300):
    for _ in range(seconds * 10):
        if what(): return
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)
    raise AssertionError("nothing happened")


STATES = "glyphs-stanet-meta-*"  # the folders of the runs on glyphs under scratch/
GOES_ON = "the same command or cell goes on from there"


def training_begun(folder): return lambda: list((folder / "scratch").glob(f"{STATES}/.lock"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = clone_without_lock(tmp_path_factory.mktemp("two") / "project")
    def long(params):
        leave_only(params, ("glyphs", "omniglot"), ("quickstart", "table4"))
        faults.small(params)
        params["recipes"]["quick"].update(steps=100_000)
    edit_params(folder, long)
    run("stanet", "fingerprints", cwd=folder, check=False)  # fewer stages, which DVC reads before it begins
    run("dvc", "repro", "glyphs", f"tasks@{TEST.task_set}", cwd=folder)
    return folder


def assert_busy(folder, command, name):
    "The command ends with one line: another process is at work."
    done = run(*command, cwd=folder, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    expected = rf"stanet: another process is at work on {name}; wait until it has ended, or stop it"
    assert re.fullmatch(expected, last)


def test_one_waits_or_refuses_and_interrupt_saves(pipeline):
    first = started(pipeline, "dvc", "repro", f"train@{KEY}")
    try:
        wait_for(first, training_begun(pipeline))
        second = run("dvc", "repro", f"train@{KEY}", cwd=pipeline, check=False)
        assert second.returncode and "is busy, it is being blocked by" in second.stdout + second.stderr
        assert_busy(pipeline, ("stanet", "train", KEY), f"{KEY}-train")
        assert_busy(pipeline, ("stanet", "fit", KEY), "glyphs-stanet-meta-[0-9a-f]{16}")
        before = (pipeline / "results" / "table4.csv").read_text()
        run("stanet", "report", "table4", cwd=pipeline)  # a table renders beside a training
        assert (pipeline / "results" / "table4.csv").read_text() == before and first.poll() is None
    finally: os.killpg(first.pid, signal.SIGINT)
    said = first.communicate(timeout=300)[0]
    stopped = rf"stanet: stopped and saved at step [\d,]+ of 100,000; {GOES_ON}"
    assert re.search(rf"^{stopped}$", said, re.M) and "Traceback" not in said
    assert re.search(r"exited with (130|-2)$", said, re.M)  # of `stanet`, or of the shell around it
    state, = (pipeline / "scratch").glob(STATES)
    assert runtime.Checkpoints(state).latest()[1]["step"] > 0 and not list(pipeline.rglob("*.partial"))


def states_in(folder) -> dict:  # folder -> step of its newest state
    found = {f: runtime.Checkpoints(f).latest() for f in (folder / "scratch").glob(STATES)}
    return {f: latest[1]["step"] for f, latest in found.items() if latest}


def test_interrupted_fit_goes_on(pipeline):
    edit_params(pipeline, lambda p: p["recipes"]["quick"].update(steps=4000))
    before, seen = states_in(pipeline), []
    line = rf"stanet: stopped and saved at step ([\d,]+) of 4,000; {GOES_ON}"
    for _ in range(2):
        process = started(pipeline, "stanet", "fit", KEY)
        for said in process.stdout:  # training has begun, and in the second round gone on
            if said.startswith("step "): break
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=300)[0]
        stopped = re.fullmatch(line, said.strip().splitlines()[-1])
        assert process.returncode == 130 and stopped
        seen.append(int(stopped[1].replace(",", "")))
        now = states_in(pipeline)
        assert [step for f, step in now.items() if f not in before] == seen[-1:]  # other length, other state
    assert 400 <= seen[0] < seen[1]


class Kernel:
    "A kernel of Jupyter with the tests on its path."
    def __init__(self):
        from jupyter_client.manager import start_new_kernel
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(ROOT / "tests"), env=env)

    def run(self, code, when=lambda type_, said: False):
        "Run a cell and return what it said; it is interrupted once, as soon as `when` holds for a message."
        message, said, pressed = self.client.execute(code), "", False
        while True:
            got = self.client.get_iopub_msg(timeout=300)
            if got["parent_header"].get("msg_id") != message: continue
            type_, content = got["msg_type"], got["content"]
            if type_ == "stream": said += content["text"]
            if type_ == "error": said += f"{content['ename']}: {content['evalue']}"
            if type_ == "status" and content["execution_state"] == "idle": return said
            if not pressed and when(type_, said):
                self.manager.interrupt_kernel()
                pressed = True

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


SLOW_TO_BEGIN = """
import test_faults as t
usual = t.training.State.advance
def advance(state, *values):
    usual(state, *values)
    if state.step == 3: print('begun', flush=True)
t.training.State.advance = advance
"""


def test_interrupted_cell_of_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    kernel, cell = Kernel(), f"r = t.toy_run({str(tmp_path)!r}, save_seconds=1e9, steps=10_000_000)"
    line = rf"KeyboardInterrupt: stopped and saved at step ([\d,]+) of 10,000,000; {GOES_ON}"
    def step_in(said): return int(re.search(line, said)[1].replace(",", ""))
    def running(type_, said):
        if type_ == "execute_input": time.sleep(3)
        return type_ == "execute_input"
    try:
        assert "Error: " not in kernel.run(SLOW_TO_BEGIN)
        step = step_in(kernel.run(cell, lambda _, said: "begun" in said))
        assert runtime.Checkpoints(tmp_path).latest()[1]["step"] == step >= 3
        said = kernel.run(cell, running)
        assert "begun" not in said and step_in(said) > step
    finally: kernel.close()
