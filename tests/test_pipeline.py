"The real pipeline on the embedded data set, made small: what runs again, and whether results repeat."
import json, re, shutil
from concurrent.futures import ThreadPoolExecutor
import nbformat, pytest, yaml
from conftest import BIN, ROOT, clone_without_lock, edit_params, leave_only, run

SET = "glyphs-5w1s"
RUNS = [f"{SET}-stanet3", f"{SET}-stanet3-uniform", f"{SET}-protonet"]
TRAINED = {"model.safetensors", "history.csv", "card.json", "train.ipynb", "tests"}


def small(params):
    "The quickstart alone, and that small."
    leave_only(params, ("glyphs",), ("quickstart",))
    small = dict(steps=12, tasks=2, regroupings=2, query=2)
    for name in ("quick", "quick-protonet"): params["recipes"][name].update(small)
    params["task_sets"][SET].update(n=60, query=3)
    for key in RUNS: params["runs"][key].update(width=8)
    for key in RUNS[:2]: params["runs"][key].update(d_k=8, d_v=8)


def stages_run(text): return re.findall(r"Running stage '([^']+)'", text)


def repro(folder): return stages_run(run("dvc", "repro", "report@quickstart", cwd=folder).stdout)


def stages_of(name):
    "The stages from a test to its table."
    return [f"test@{name}", f"cell@{name}-in-quickstart", "report@quickstart"]


def answers_of(folder, key): return folder / "runs" / key / "tests" / SET


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    "A project whose quickstart has been made small and run by `make quickstart`; and what that said."
    place = tmp_path_factory.mktemp("my papers")
    folder = clone_without_lock(place / "stänet", without=("runs/",))
    (place / "bin").symlink_to(BIN)
    edit_params(folder, small)
    run("stanet", "fingerprints", cwd=folder, check=False)  # fewer stages, which DVC reads before it begins
    done = run("make", "-o", "env", f"BIN={place / 'bin'}", "quickstart", cwd=folder)
    return folder, done.stdout


def test_everything_is_made(pipeline):
    folder, said = pipeline
    stages = set(stages_run(said))
    assert {f"train@{k}" for k in RUNS} < stages and {f"test@{k}-on-{SET}" for k in RUNS} < stages
    parts = r'^Trainings.*two at a time:$|^.*/dvc" repro report@quickstart$'
    alone, at_once, rest = re.split(parts, said, flags=re.M)
    assert "train@" not in alone and stages_run(rest) == ["report@quickstart"]
    assert {f"train@{k}" for k in RUNS} < set(stages_run(at_once))
    for key in RUNS:
        assert {p.name for p in (folder / "runs" / key).iterdir()} == TRAINED
        assert {p.name for p in answers_of(folder, key).iterdir()} == {"metrics.json", "answers.npz"}
        assert (folder / "runs" / key / "train.ipynb").stat().st_size < 200_000
    rows = (folder / "results" / "quickstart.csv").read_text().splitlines()
    columns = "method,variant,backbone,params,dataset,way,shot,paper,paper_ci,ours,ours_ci,tasks,seeds,status"
    assert rows[0].startswith(f"{columns},run,recipe,steps,images")
    assert len(rows) == 4 and all(",measured," in r for r in rows[1:])


def test_card_says_what_made_the_run(pipeline):
    card = json.loads((pipeline[0] / "runs" / RUNS[2] / "card.json").read_text())
    assert card["run"]["method"] == "protonet" and len(card["code"]["fingerprint"]) == 64
    assert {"commit", "fingerprint"} == card["code"].keys()
    assert {"sha256", "parameters", "bytes"} == card["weights"].keys()
    noted = ("device", "system", "python", "torch", "precision", "training_seconds", "images")
    for field in noted: assert card[field]


def test_second_repro_does_nothing(pipeline): assert repro(pipeline[0]) == []


def test_prose_does_not_retrain(pipeline):
    folder, _ = pipeline
    path = folder / "nbs" / "experiments" / "train.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"][0]["source"] = "# Train one run\n\nBetter prose."
    nb["cells"][-1]["source"] = "if not by_hand: record(run, net, history, trained, data)  # the same"
    path.write_text(json.dumps(nb, indent=1))
    module = folder / "stanet" / "attention.py"
    old = '"Attention over the sites of each image, given a test representation (eq. 3 and 4)."'
    assert old in module.read_text()
    module.write_text(module.read_text().replace(old, '"A better docstring."') + "\n# a comment\n")
    assert repro(folder) == ["fingerprints"]


def test_one_run_changed_reruns_it_and_its_table(pipeline):
    folder, _ = pipeline
    edit_params(folder, lambda p: p["runs"][RUNS[2]].update(seed=1))
    name = f"{RUNS[2]}-on-{SET}"
    assert repro(folder) == ["fingerprints", f"train@{RUNS[2]}", *stages_of(name)]


def test_same_run_same_weights_and_answers(pipeline):
    folder, _ = pipeline
    def made():
        trained = [folder / "runs" / RUNS[0] / n for n in ("history.csv", "model.safetensors")]
        files = [*trained, *answers_of(folder, RUNS[0]).iterdir()]
        return {p.name: p.read_bytes() for p in files}
    first = made()
    shutil.rmtree(folder / "scratch")
    for stage in (f"train@{RUNS[0]}", f"test@{RUNS[0]}-on-{SET}"):
        run("dvc", "repro", "--force", "--single-item", stage, cwd=folder)
    assert made() == first


def test_two_repros_side_by_side(pipeline):
    "Each does its work or says that the other is at work; dvc.lock is whole, and nothing is out of order."
    folder, _ = pipeline
    names = [f"test@{key}-on-{SET}" for key in RUNS[:2]]
    again_alone = ("dvc", "repro", "--force", "--single-item")
    def again(name): return run(*again_alone, name, cwd=folder, check=False)
    with ThreadPoolExecutor() as pool: both = list(pool.map(again, names))
    assert any(done.returncode == 0 for done in both)
    for done in both: assert "Traceback" not in done.stderr
    for done in both: assert done.returncode == 0 or "lock" in done.stdout + done.stderr
    assert "schema" in yaml.safe_load((folder / "dvc.lock").read_text())
    assert "up to date" in run("dvc", "status", *names, cwd=folder).stdout


def test_wrong_parameter_stops_before_training(project):
    edit_params(project, lambda p: p["runs"][RUNS[0]].update(layer=3))
    done = run("dvc", "repro", "report@quickstart", cwd=project, check=False)
    assert done.returncode
    assert f"runs.{RUNS[0]}.layer" in done.stdout + done.stderr
    assert "train@" not in done.stdout


def test_a_new_row_asks_for_the_same_command_again(pipeline):
    "Another shot of the same weights: nothing is trained."
    folder, _ = pipeline
    def more(p):
        p["task_sets"]["glyphs-5w3s"] = dict(pack="glyphs", split="glyphs", way=5, shot=3, query=3, n=60)
        row = dict(method="STANet", variant="3 layers", backbone="Conv64", dataset="glyphs")
        p["reports"]["quickstart"]["rows"].append(row | dict(task_set="glyphs-5w3s", run=RUNS[0]))
    edit_params(folder, more)
    stale = run("dvc", "repro", "report@quickstart", cwd=folder, check=False)
    assert stale.returncode and "run the same command again" in stale.stdout + stale.stderr
    name = f"{RUNS[0]}-on-glyphs-5w3s"
    assert repro(folder) == ["fingerprints", "tasks@glyphs-5w3s", *stages_of(name)]


def blocks(tutorial):
    "The Python, YAML and other blocks that a tutorial's text shows."
    cells = nbformat.read(ROOT / "nbs" / "tutorials" / tutorial, 4).cells
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    return {kind: re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "yaml")}


def add_from_tutorial(folder, text):
    "Put the runs and rows of a tutorial's YAML into params.yaml; returns the keys of the runs."
    known = yaml.safe_load((folder / "params.yaml").read_text())
    anchors = "".join(f"{n}: &{n} {json.dumps(v)}\n" for n, v in known["networks"].items())
    added = yaml.safe_load(f"{anchors}{text}")
    def add(p):
        p["runs"].update(added["runs"])
        p["reports"]["quickstart"]["rows"] += added["rows"]
    edit_params(folder, add)
    return list(added["runs"])


def test_tutorial_adds_an_attention_variant(pipeline):
    folder, _ = pipeline
    shown = blocks("3_new_attention.ipynb")
    path = folder / "nbs" / "07_attention.ipynb"
    nb = nbformat.read(path, 4)
    nb.cells += [nbformat.v4.new_code_cell(code) for code in shown["python"][:2]]
    nbformat.write(nb, path)
    run("nbdev_export", cwd=folder)
    run("nbdev_test", "--path", path, "--n_workers", "0", cwd=folder)
    (key,) = add_from_tutorial(folder, shown["yaml"][0])
    run("stanet", "check", cwd=folder)
    first = run("dvc", "repro", "report@quickstart", cwd=folder, check=False)
    assert "run the same command again" in first.stderr
    name = f"{key}-on-{SET}"
    assert repro(folder) == ["fingerprints", f"train@{key}", *stages_of(name)]
    table = (folder / "results" / "quickstart.md").read_text()
    assert len(re.findall(r"sharp attention.*\d\d\.\d\d ± ", table)) == 1


def cell_with(tutorial, text):
    "The source of the one code cell of a tutorial that holds `text`."
    cells = nbformat.read(ROOT / "nbs" / "tutorials" / tutorial, 4).cells
    (source,) = [c.source for c in cells if c.cell_type == "code" and text in c.source]
    return source


def test_tutorial_adds_a_method(pipeline):
    "A notebook, a run and a row: no other file is edited, and nothing recorded is trained again."
    folder, _ = pipeline
    wanted = ("from stanet.method import", "class Ridge(")
    imports, method = (cell_with("4_new_method.ipynb", text) for text in wanted)
    assert len(f"{imports}\n{method}".splitlines()) < 40
    sources = ["#| default_exp methods.ridge", f"#| export\n{imports}", f"#| export\n{method}"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    nbformat.write(nb, folder / "nbs" / "methods" / "ridge.ipynb")
    run("nbdev_export", cwd=folder)
    edit_params(folder, lambda p: p["runs"]["glyphs-5w1s-stanet3"].update(penalty=2.0))
    refused = run("stanet", "check", cwd=folder, check=False).stderr
    assert "runs.glyphs-5w1s-stanet3.penalty" in refused
    edit_params(folder, lambda p: p["runs"]["glyphs-5w1s-stanet3"].pop("penalty"))
    (key,) = add_from_tutorial(folder, blocks("4_new_method.ipynb")["yaml"][0])
    edit_params(folder, lambda p: p["runs"][key].update(width=8))
    assert "run the same command again" in run("stanet", "fingerprints", cwd=folder, check=False).stderr
    name = f"{key}-on-{SET}"
    assert repro(folder) == ["fingerprints", f"train@{key}", *stages_of(name)]
    table = (folder / "results" / "quickstart.md").read_text()
    assert len(re.findall(r"Ridge regression.*\d\d\.\d\d ± ", table)) == 1
