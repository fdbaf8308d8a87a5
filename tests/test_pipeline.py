"The real pipeline on the embedded data set, made small: what runs again, what doesn't, and whether a result repeats itself."
import json, re, shutil
import nbformat, pytest, yaml
from conftest import ROOT, clone, edit_params, run

RUNS = ["glyphs-5w1s-stanet3", "glyphs-5w1s-stanet3-nosemantic", "glyphs-5w1s-stanet3-uniform"]


def small(params):
    params["recipes"]["quick"].update(steps=12, tasks=2, mix=2, query=2)
    params["task_sets"]["glyphs-5w1s"].update(n=60, query=3)
    for key in RUNS: params["runs"][key].update(width=8, d_k=8, d_v=8)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    "A project whose quickstart has been made small and run; and what DVC said."
    folder = clone(tmp_path_factory.mktemp("pipeline") / "project")
    edit_params(folder, small)
    done = run("dvc", "repro", "report@quickstart", cwd=folder)
    return folder, done.stdout


def stages_run(text): return re.findall(r"Running stage '([^']+)'", text)


def repro(folder): return stages_run(run("dvc", "repro", "report@quickstart", cwd=folder).stdout)


def test_everything_is_made(pipeline):
    folder, said = pipeline
    assert {f"train@{k}" for k in RUNS} < set(stages_run(said))
    for key in RUNS:
        made = {p.name for p in (folder / "runs" / key).iterdir()}
        assert made == {"model.safetensors", "metrics.json", "history.csv", "tasks.npz", "card.json", "train.ipynb"}
        assert (folder / "runs" / key / "train.ipynb").stat().st_size < 200_000
    rows = (folder / "results" / "quickstart.csv").read_text().splitlines()
    assert rows[0] == "method,variant,backbone,params,dataset,way,shot,paper,paper_ci,ours,ours_ci,tasks,seeds,status,run,recipe,steps,images"
    assert len(rows) == 4 and all(",measured," in r for r in rows[1:])


def test_second_repro_does_nothing(pipeline): assert repro(pipeline[0]) == []


def test_prose_does_not_retrain(pipeline):
    folder, _ = pipeline
    path = folder / "nbs" / "experiments" / "train.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"][0]["source"] = "# Train one run\n\nBetter prose."
    path.write_text(json.dumps(nb, indent=1))
    module = folder / "stanet" / "attention.py"
    module.write_text(module.read_text().replace('"Attention over the sites of each image, given a test representation (eq. 3 and 4)."', '"A better docstring."') + "\n# a comment\n")
    assert "A better docstring" in module.read_text()
    assert repro(folder) == ["fingerprints"]


def test_one_run_changed_reruns_it_and_its_table(pipeline):
    folder, _ = pipeline
    edit_params(folder, lambda p: p["runs"][RUNS[2]].update(seed=1))
    assert repro(folder) == ["fingerprints", f"train@{RUNS[2]}", "cell@quickstart-glyphs-5w1s-stanet3-uniform", "report@quickstart"]


def test_code_changes_the_fingerprint_of_runs_that_use_it(pipeline):
    folder, _ = pipeline
    module = folder / "stanet" / "attention.py"
    before, marks = module.read_text(), lambda: {p.name: p.read_text() for p in (folder / "fingerprints").iterdir()}
    first = marks()
    module.write_text(before.replace("1 / C.shape[3]", "1.0 / C.shape[3]"))
    run("stanet", "fingerprints", cwd=folder)
    changed = {n for n, m in marks().items() if m != first[n]}
    module.write_text(before)
    run("stanet", "fingerprints", cwd=folder)
    uniform = {f"run-{k}" for k, r in yaml.safe_load((folder / "params.yaml").read_text())["runs"].items() if r.get("attention") == "UniformAttention"}
    assert f"run-{RUNS[2]}" in changed and changed == uniform and marks() == first


def test_same_run_same_metrics(pipeline):
    folder, _ = pipeline
    first = {n: (folder / "runs" / RUNS[0] / n).read_bytes() for n in ("metrics.json", "history.csv", "tasks.npz", "model.safetensors")}
    shutil.rmtree(folder / "scratch")
    run("dvc", "repro", "--force", "--single-item", f"train@{RUNS[0]}", cwd=folder)
    assert {n: (folder / "runs" / RUNS[0] / n).read_bytes() for n in first} == first


def test_wrong_parameter_stops_before_training(project):
    edit_params(project, lambda p: p["runs"][RUNS[0]].update(layer=3))
    done = run("dvc", "repro", "report@quickstart", cwd=project, check=False)
    assert done.returncode and f"runs.{RUNS[0]}.layer" in done.stdout + done.stderr and "train@" not in done.stdout


def test_tutorial_adds_an_attention_variant(pipeline):
    folder, _ = pipeline
    text = "\n".join(c.source for c in nbformat.read(ROOT / "nbs" / "tutorials" / "3_new_attention.ipynb", 4).cells if c.cell_type == "markdown")
    variant, check, additions, row = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)[n] for kind, n in (("python", 0), ("python", 1), ("yaml", 0), ("csv", 0)))
    path = folder / "nbs" / "07_attention.ipynb"
    nb = nbformat.read(path, 4)
    nb.cells += [nbformat.v4.new_code_cell(variant), nbformat.v4.new_code_cell(check)]
    nbformat.write(nb, path)
    run("nbdev_export", cwd=folder)
    run("nbdev_test", "--path", path, "--n_workers", "0", cwd=folder)
    known = yaml.safe_load((folder / "params.yaml").read_text())
    added = yaml.safe_load(f"networks: {{glyphs: &glyphs {json.dumps(known['networks']['glyphs'])}}}\n{additions}")
    edit_params(folder, lambda p: [p[kind].update(added[kind]) for kind in ("runs", "cells")])
    with open(folder / "nbs" / "results" / "paper.csv", "a") as f: f.write(row)
    run("stanet", "check", cwd=folder)
    (key,), (cell,) = added["runs"], added["cells"]
    assert repro(folder) == ["fingerprints", f"train@{key}", f"cell@{cell}", "report@quickstart"]
    assert len(re.findall(r"sharp attention.*\d\d\.\d\d ± ", (folder / "results" / "quickstart.md").read_text())) == 1
