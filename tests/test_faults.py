"What real machines and people do to a run: a cross-section of `make faults`, and what needs a disk, a kernel, a terminal or two processes."
import ast, errno, json, os, random, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import nbformat, pytest, torch, yaml
from hypothesis import HealthCheck, given, settings, strategies as st
import faults
import stanet.experiment as experiment, stanet.parameters as parameters, stanet.packs as packs, stanet.training as training
from conftest import BIN, ROOT, clone, edit_params, run
from stanet.glyphs import glyphs
from stanet.network import build, take

KEY = faults.KEY
CONFIG = dict(backbone="Conv64", channels=1, width=8, pools=2, way=5, layers=2, d_k=8, d_v=8, attention="SpatialAttention", n_semantic=16, mean=[0.5], std=[0.3])
OPTIONS = dict(steps=20, tasks=4, query=3, single=False, classes="uniform", lr=3e-3, schedule="cosine", decay_head=False, average=0.9, shift=0.1, precision="float32")


def toy():
    dice = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 256, (16, 1, 12, 12, 1), generator=dice)
    return (prototypes + torch.randint(-60, 61, (16, 10, 12, 12, 1), generator=dice)).clamp(0, 255).byte().flatten(0, 1), torch.arange(16).repeat_interleave(10)


def toy_run(folder, config=CONFIG, save_seconds=0.0, **options):
    torch.manual_seed(0)
    images, labels = toy()
    return training.train(build(config), images, labels, labels, 5, 1, training.Recipe(**OPTIONS | options), folder, every=5, save_seconds=save_seconds)


def same(net, other): return all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return toy_run(tmp_path_factory.mktemp("whole"))


# -- the campaign, and any change of a file

def test_cross_section_of_the_campaign(tmp_path):
    said = run(sys.executable, "tests/faults.py", "--kills", 6, "--inputs", 150, "--pipeline", 0, "--seed", 2, "--output", tmp_path / "faults.json", cwd=ROOT).stdout
    refused, accepted = map(int, re.fullmatch(r"faults: kills 6/6 survived, inputs (\d+) refused, (\d+) accepted unchanged, 0 wrong", said.splitlines()[-1]).groups())
    assert refused + accepted == 150 and refused > 100
    assert json.loads((tmp_path / "faults.json").read_text())["summary"] == said.splitlines()[-1]


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
    states = training.Checkpoints(folder)
    states.save(10, *faults.STATES[0])
    (folder / name).write_bytes(data[:i] if cut else data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1:])
    assert states.latest()[1]["step"] == 10 and not (folder / name).exists()
    (folder / name).write_bytes(data)
    assert states.latest()[1]["step"] == 20


def test_other_parameters_code_or_data_have_another_state(tmp_path, monkeypatch):
    faults.make_project(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    run, pack = parameters.find_run(KEY), glyphs(classes=40, per_class=8)
    here = experiment.scratch_folder(run, pack)
    training.Checkpoints(here).save(40, *faults.STATES[0])
    assert training.Checkpoints(experiment.scratch_folder(run, pack)).latest() is not None
    pixel = pack.images.clone(); pixel[0, 0, 0, 0] ^= 1
    others = [experiment.scratch_folder(run.model_copy(update={"lr": run.lr * 2}), pack), experiment.scratch_folder(run, packs.Pack(pixel, pack.labels, pack.classes, pack.parents, pack.boxes, pack.name))]
    usual = experiment._definitions
    monkeypatch.setattr(experiment, "_definitions", lambda: usual() | {"training_step": ast.parse("def training_step(): return 1").body[0]})
    others.append(experiment.scratch_folder(run, pack))
    assert len({here, *others}) == 4 and all(training.Checkpoints(f).latest() is None for f in others)


# -- parameters

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dice=st.randoms(use_true_random=True))
def test_no_wrong_parameters_pass(tmp_path_factory, dice):
    folder = tmp_path_factory.mktemp("params")
    os.environ["FAULTS_MARK"] = str(folder.parent / "mark")
    form = faults.FORMATS[-1]
    assert form.name == "params.yaml"
    (folder / form.name).write_bytes(form.make())
    sound = form.load(folder / form.name)
    data, must = faults.change_yaml(form.make(), dice)
    assert data == form.make() or faults.outcome(form, data, must, sound, folder) in ("refused", "accepted", "edit"), data


def run_of(params): return params["runs"]["omniglot-5w1s-stanet1"]


@pytest.mark.parametrize("change, answer", [
    (lambda p: (run_of(p).update(way=424), p["task_sets"]["omniglot-5w1s"].update(way=424)), "task_sets.omniglot-5w1s.way: 424, but there are 423 test classes"),
    (lambda p: run_of(p).update(query=20), "runs.omniglot-5w1s-stanet1.shot: shot and queries make 21 images a class, but the smallest train class has 20"),
    (lambda p: p["task_sets"]["omniglot-5w1s"].update(query=20), "task_sets.omniglot-5w1s.shot: shot and queries make 21 images a class"),
    (lambda p: run_of(p).update(tasks=1000), "runs.omniglot-5w1s-stanet1.tasks: 1000 tasks of 5 different classes need 5000, but there are 4800 train classes"),
    (lambda p: p["reports"].append("figure9"), "reports.figure9: there is no notebook nbs/results/figure9.ipynb"),
    (lambda p: p["cells"].update(x={"report": "figure9", "run": "maml"}), "cells.x.run: there is no run 'maml'"),
    (lambda p: p["cells"].update(x={"report": "figure9", "run": "maml"}), "cells.x.report: there is no report 'figure9'"),
    (lambda p: run_of(p).update(recipe="slow"), "runs.omniglot-5w1s-stanet1.recipe: there is no such recipe"),
    (lambda p: run_of(p).update(backbone="ResNet99"), "runs.omniglot-5w1s-stanet1.backbone: there is no 'ResNet99'"),
    (lambda p: run_of(p).update(attention="TaskAttention"), "runs.omniglot-5w1s-stanet1: its network can't be built"),
    (lambda p: p["task_sets"]["omniglot-5w1s"].update(pack="imagenet"), "task_sets.omniglot-5w1s.pack: there is no pack 'imagenet'"),
    (lambda p: p["recipes"]["choice"].update(momentum=0.9), "recipes.choice.momentum: Extra inputs are not permitted"),
    (lambda p: p["networks"]["glyphs"].update(depth=3), "networks.glyphs.depth: Extra inputs are not permitted"),
    (lambda p: p["networks"]["glyphs"].update(pack="letters"), "networks.glyphs.pack: there is no pack 'letters'"),
    (lambda p: p["networks"]["glyphs"].update(attention="Soft"), "networks.glyphs.attention: there is no 'Soft'"),
    (lambda p: p.update(runs=[]), "runs: a mapping is expected (found [])"),
    (lambda p: p.update(figures=[]), "figures: there is no such section"),
    (lambda p: p["runs"].update({"a b; rm": {}}), "runs.a b; rm: a name is of small letters"),
    (lambda p: run_of(p).update(key="other"), "runs.omniglot-5w1s-stanet1.key: the name of a run is where it stands"),
    (lambda p: run_of(p).update(steps=True, lr=float("inf")), "runs.omniglot-5w1s-stanet1.steps: Input should be a valid integer (found True)"),
], ids=lambda v: v[:60] if isinstance(v, str) else "")
def test_parameters_that_do_not_fit(change, answer):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params = json.loads(json.dumps(params))  # without the sharing of YAML's anchors
    change(params)
    none, found = parameters.problems_of(params)
    assert none is None and any(line.startswith(answer) for line in found), found


def test_extents_are_those_of_the_data():
    for name, splits in parameters.EXTENTS.items():
        for split, parts in splits.items():
            text = ROOT / "nbs" / "splits" / f"{split}.txt"
            if text.is_file(): assert {part: sum(line.startswith(f"{part}\t") for line in text.read_text().splitlines()) for part in parts} == {part: n for part, (n, _) in parts.items()}
            if parameters.pack_path(name).is_file(): assert parameters.extents(name, split) == parts


# -- weights and pickles

def test_nothing_is_unpickled():
    forbidden = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("pd", "read_pickle"), ("pandas", "read_pickle"), ("joblib", "load"), ("dill", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load")}
    for path in sorted((ROOT / "stanet").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name): assert (node.value.id, node.attr) not in forbidden, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.ImportFrom): assert not {(node.module, n.name) for n in node.names} & forbidden, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle": assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{path.name}:{node.value.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "weights_only": assert False, f"{path.name}:{node.value.lineno}"


# -- disks

@pytest.fixture
def disk(tmp_path, monkeypatch):
    "A small disk: its folder, and functions that fill and free it. Where none can be mounted, writing to the disk fails as on a full one."
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode
    full, usual = [], os.fsync
    def fsync(handle):
        if full: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        usual(handle)
    if not mounted: monkeypatch.setattr(os, "fsync", fsync)
    def fill():
        full.append(True)
        if mounted:
            with open(folder / "filler", "wb", buffering=0) as f:
                try:
                    while True: f.write(b"\0" * 4096)
                except OSError: pass
    def free(): full.clear(); (folder / "filler").unlink(missing_ok=True)
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
    assert "\n" not in line and "step-00000015" in line and line.endswith("can't be written (No space left on device); make room and run the same command again, what was there before is unharmed")
    assert training.Checkpoints(folder / "states").latest()[1]["step"] == 10 and not list((folder / "states").glob(".*.partial"))
    free()
    net, history, _ = toy_run(folder / "states")
    assert same(net, whole[0]) and history.equals(whole[1])


def test_old_file_stays_when_the_disk_is_full(disk):
    folder, fill, free = disk
    packs.save_pack(faults.small_pack(), folder / "small.safetensors")
    fill()
    with pytest.raises(OSError, match="small.safetensors: can't be written"): packs.save_pack(packs.Pack(torch.zeros(3000, 20, 20, 3, dtype=torch.uint8), torch.zeros(3000).long(), ["a"], ["a"]), folder / "small.safetensors")
    free()
    assert packs.pack_digest(packs.load_pack(folder / "small.safetensors")) == packs.pack_digest(faults.small_pack())
    assert [p.name for p in folder.iterdir()] == ["small.safetensors"]


# -- numbers

def test_nan_loss_names_step_and_tensor(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 5: the loss is nan, and \d+ of \d+ tensors are not finite, the first of them \w+"): toy_run(tmp_path, CONFIG | {"std": [0.0]})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite(tmp_path, monkeypatch, value):
    usual = training.State.advance
    def advance(state, values):
        usual(state, values)
        if state.step == 10: state.net.layers[1].task.W_v.weight.data[0, 0] = value
    monkeypatch.setattr(training.State, "advance", advance)
    with pytest.raises(FloatingPointError, match=r"step 10: the loss is [\d.]+, and 1 of \d+ tensors are not finite, the first of them layers.1.task.W_v.weight"): toy_run(tmp_path)
    assert training.Checkpoints(tmp_path).latest()[1]["step"] == 5


def gradients(threads, look_up):  # of maps that stand in many tasks
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        dice = torch.Generator().manual_seed(0)
        maps = torch.randn(240, 64, 4, 4, generator=dice).to(memory_format=torch.channels_last).requires_grad_()
        index = torch.randint(240, (64, 20), generator=dice)
        (look_up(maps, index) * torch.randn(64, 20, 64, 4, 4, generator=dice)).sum().backward()
        return maps.grad
    finally: torch.set_num_threads(usual)


def test_gradients_are_the_same_every_time():
    assert len({packs.digest(gradients(threads, take).contiguous()) for threads in (1, 2, 2, 2, 2, 4)}) == 1
    assert torch.allclose(gradients(1, take), gradients(1, lambda maps, index: maps[index]))


def test_threads_agree(tmp_path, whole):
    before, found = torch.get_num_threads(), {}
    images = toy()[0].permute(0, 3, 1, 2).float() / 255
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            _, history, _ = toy_run(tmp_path / str(n))
            with torch.no_grad():
                maps = whole[0].embed(images)[None]
                found[n] = torch.tensor(history.loss), whole[0].classify(maps[:, :50:10], torch.arange(5)[None], maps[:, 1:50])
    finally: torch.set_num_threads(before)
    for n in (2, 4): assert (found[n][0] - found[1][0]).abs().max() < 1e-3 and (found[n][1] - found[1][1]).abs().max() < 1e-4


# -- two processes of one training

WORKER = """
import json, os, signal, sys, time
import torch, stanet.training as training, test_faults as t
from stanet.packs import digest
rank, folder = int(os.environ["RANK"]), sys.argv[1]
seen, saves, stopped = [], [], None
gather, augment, advance, save = training.gather, training.augment, training.State.advance, training.Checkpoints.save
def gathered(images, index): seen.append([index.tolist()]); return gather(images, index)
def augmented(*args): out = augment(*args); seen[-1].append([digest(image.contiguous()) for image in out]); return out
def saved(self, step, *rest):
    time.sleep(1)  # the other process is ahead of the one that writes
    saves.append(step); save(self, step, *rest)
def pressed(self, values):
    advance(self, values)
    if rank == 1 and self.step == 7: os.kill(os.getpid(), signal.SIGINT)
training.gather, training.augment, training.Checkpoints.save = gathered, augmented, saved
whole, history, _ = t.toy_run(folder + "/whole")
batches = list(seen)
training.State.advance = pressed
try: t.toy_run(folder + "/stopped", save_seconds=1e9)
except KeyboardInterrupt as stop: stopped = str(stop)
training.State.advance = advance
seen.clear()
again, other, _ = t.toy_run(folder + "/stopped")
open(f"{folder}/{rank}.json", "w").write(json.dumps({"batches": batches, "saves": saves, "stopped": stopped, "steps after": len(seen), "same": t.same(whole, again), "history": history.to_dict("list"), "same history": history.equals(other)}))
import torch.distributed; torch.distributed.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "worker.py", str(tmp_path)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    seen, usual, augment = [], training.gather, training.augment
    monkeypatch.setattr(training, "gather", lambda images, index: (seen.append([index]), usual(images, index))[1])
    def augmented(*args):
        out = augment(*args)
        seen[-1].append([packs.digest(image.contiguous()) for image in out])
        return out
    monkeypatch.setattr(training, "augment", augmented)
    _, history, _ = toy_run(tmp_path / "one")
    for (index, pixels), *parts in zip(seen, first["batches"], second["batches"], strict=True):  # row t of a batch is task t; process r has the rows r, r + 2, ...
        rows, pixels = index.view(4, -1), [pixels[i * len(pixels) // 4:(i + 1) * len(pixels) // 4] for i in range(4)]
        for rank, (part, images) in enumerate(parts): assert part == rows[rank::2].flatten().tolist() and images == sum(pixels[rank::2], [])
    assert first["saves"] == [5, 10, 15, 20, 7, 10, 15, 20] and second["saves"] == []  # one process writes
    assert first["stopped"] == second["stopped"] == "stopped and saved at step 7 of 20; the same command or cell goes on from there"
    assert first["steps after"] == second["steps after"] == 13  # both go on from there
    assert first["same"] and first["same history"] and first["history"] == second["history"]
    assert abs(first["history"]["loss"][0] - history.loss[0]) < 0.2  # batch normalisation sees half of the images, so not the same numbers


# -- Ctrl-C, and the same thing twice at once, in a real pipeline

def started(folder, *command):
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(process, what, seconds=300):
    for _ in range(seconds * 10):
        if what(): return
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)
    raise AssertionError("nothing happened")


def training_begun(folder): return lambda: list((folder / "scratch").glob("glyphs-3-*/.lock"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = clone(tmp_path_factory.mktemp("two") / "project")
    def long(params):
        faults.small(params)
        params["recipes"]["quick"].update(steps=100_000)
    edit_params(folder, long)
    run("dvc", "repro", "glyphs", "tasks@glyphs-5w1s", cwd=folder)
    return folder


def test_one_waits_or_refuses_and_interrupt_saves(pipeline):
    first = started(pipeline, "dvc", "repro", f"train@{KEY}")
    try:
        wait_for(first, training_begun(pipeline))
        second = run("dvc", "repro", f"train@{KEY}", cwd=pipeline, check=False)
        assert second.returncode and "is busy, it is being blocked by" in second.stdout + second.stderr
        third = run("stanet", "train", KEY, cwd=pipeline, check=False)
        assert third.returncode == 1 and third.stderr.splitlines()[-1] == f"stanet: another process is at work on {KEY}-train; wait until it has ended, or stop it" and "Traceback" not in third.stderr
        fourth = run("stanet", "fit", KEY, cwd=pipeline, check=False)
        assert fourth.returncode == 1 and re.fullmatch(rf"stanet: another process is at work on glyphs-3-[0-9a-f]+; .*", fourth.stderr.splitlines()[-1])
        before = (pipeline / "results" / "table4.csv").read_text()
        run("stanet", "report", "table4", cwd=pipeline)  # a table renders beside a training
        assert (pipeline / "results" / "table4.csv").read_text() == before and first.poll() is None
    finally: os.killpg(first.pid, signal.SIGINT)
    said = first.communicate(timeout=300)[0]
    assert re.search(r"^stanet: stopped and saved at step [\d,]+ of 100,000; the same command or cell goes on from there$", said, re.M) and "Traceback" not in said
    assert re.search(r"exited with (130|-2)$", said, re.M)  # of `stanet`, or of the shell around it
    state, = (pipeline / "scratch").glob("glyphs-3-*")
    assert training.Checkpoints(state).latest()[1]["step"] > 0 and not list(pipeline.rglob("*.partial"))


def test_interrupted_fit_goes_on(pipeline):
    edit_params(pipeline, lambda p: p["recipes"]["quick"].update(steps=4000))
    states = lambda: {f: latest[1]["step"] for f in (pipeline / "scratch").glob("glyphs-3-*") if (latest := training.Checkpoints(f).latest())}
    before, seen = states(), []
    for _ in range(2):
        process = started(pipeline, "stanet", "fit", KEY)
        for line in process.stdout:  # training has begun, and in the second round gone on
            if line.startswith("step "): break
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=300)[0]
        stopped = re.fullmatch(r"stanet: stopped and saved at step ([\d,]+) of 4,000; the same command or cell goes on from there", said.strip().splitlines()[-1])
        assert process.returncode == 130 and stopped
        seen.append(int(stopped[1].replace(",", "")))
        assert [step for f, step in states().items() if f not in before] == seen[-1:]  # a run of other length has another state
    assert 400 <= seen[0] < seen[1]


def test_interrupted_cell_of_a_notebook(tmp_path):
    from jupyter_client.manager import start_new_kernel
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT / "tests"), env=os.environ | {"PYTHONPATH": str(ROOT)})
    def cell(code, press=False):
        message, said = client.execute(code), []
        while True:
            got = client.get_iopub_msg(timeout=300)
            if got["parent_header"].get("msg_id") != message: continue
            if got["msg_type"] == "stream": said.append(got["content"]["text"])
            if got["msg_type"] == "error": said.append(f"{got['content']['ename']}: {got['content']['evalue']}")
            if press is None and got["msg_type"] == "execute_input": time.sleep(3); manager.interrupt_kernel()
            if press and "begun" in "".join(said): manager.interrupt_kernel(); press = False
            if got["msg_type"] == "status" and got["content"]["execution_state"] == "idle": return "".join(said)
    try:
        cell("import test_faults as t; usual = t.training.State.advance")
        cell("def advance(state, values):\n    usual(state, values)\n    if state.step == 3: print('begun', flush=True)\nt.training.State.advance = advance")
        long = f"r = t.toy_run({str(tmp_path)!r}, save_seconds=1e9, steps=%s)"
        said = cell(long % 10_000_000, press=True)
        stopped = re.search(r"KeyboardInterrupt: stopped and saved at step ([\d,]+) of 10,000,000; the same command or cell goes on from there", said)
        step = training.Checkpoints(tmp_path).latest()[1]["step"]
        assert stopped and int(stopped[1].replace(",", "")) == step >= 3
        said = cell(long.replace("steps=%s", f"steps={10_000_000}") + "  # the same cell", press=None)
        assert "begun" not in said and int(re.search(r"saved at step ([\d,]+)", said)[1].replace(",", "")) > step
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
