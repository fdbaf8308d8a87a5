"What changes a fingerprint, and what must not: on copies of the package with one thing changed."
import functools, json, shutil, sys
import pytest
from conftest import ROOT, edit_params, run
from stanet.fingerprints import Code, all_fingerprints, write_generated
from stanet.parameters import load_params

KEY = "omniglot-5w1s-stanet1"
STRANGER = '''
from .packs import select
class State: step = 3
class STANet(State): pass
def gather_maps(maps, index): return maps
def accuracy(correct, answers): return 0.0
def score(net, maps, tasks): return accuracy(0, 0)
def train(net): return gather_maps(net, 0)
def fit(run, pack): return train(run)
def test(net, pack): return score(net, 0, 0)
def glyphs_split(pack): return pack
'''
METHOD = '''
from ..losses import task_loss
from ..method import Method, MethodOptions, added, gather_maps
class NearestOptions(MethodOptions):
    factor: float = added(1.0, "of the distances")
class Nearest(Method):
    Options = NearestOptions
    def classify(self, support, labels, query): return self.options.factor * gather_maps(query, labels)
'''


@pytest.fixture(scope="module")
def params(): return load_params(ROOT / "params.yaml", thorough=False)


@pytest.fixture(scope="module")
def prints(params):
    "All fingerprints with the code in a folder, or with the project's own."
    return lambda folder=ROOT / "stanet": all_fingerprints(params, functools.cache(Code(folder).fingerprint))


@pytest.fixture(scope="module")
def now(prints): return prints()


@pytest.fixture
def package(tmp_path):
    leave = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(ROOT / "stanet", tmp_path / "stanet", ignore=leave)


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))


def changed(before, after):
    "The names of the entries that differ, by section."
    sections = {s: before[s].keys() | after[s].keys() for s in ("tasks", "runs", "tests")}
    return {s: {n for n in names if before[s].get(n) != after[s].get(n)} for s, names in sections.items()}


NOTHING = {"tasks": set(), "runs": set(), "tests": set()}


@pytest.mark.parametrize("name", ["aaa", "zzz"])
@pytest.mark.parametrize("place", [".", "methods"])
def test_a_module_with_any_names_changes_nothing(package, prints, now, name, place):
    (package / place / f"{name}.py").write_text(STRANGER)
    assert prints(package) == now


def test_a_module_that_nobody_refers_to_is_not_read(package, prints, now):
    (package / "draft.py").write_text("def train(:\n")
    (package / "methods" / "draft.py").write_text("def train(:\n")
    assert prints(package) == now


def test_a_new_method_changes_nothing(package, prints, now):
    (package / "methods" / "nearest.py").write_text(METHOD)
    assert prints(package) == now


PROSE = {
    "docstring": ("attention.py", "Attention over the sites", "A better sentence about the sites"),
    "comment": ("training.py", "def learning_rate(", "# a comment\n\n\ndef learning_rate("),
    "lock": ("runtime.py", "wait: float = 3.0", "wait: float = 4.0"),
    "warning": ("methods/stanet.py", "if smallest >= 1e-4", "if smallest >= 1e-5"),
    "annotation": ("training.py", "def learning_rate(recipe: Recipe, step: int) -> float",
                   "def learning_rate(recipe, step)"),
}


@pytest.mark.parametrize("what", PROSE)
def test_what_decides_no_result_changes_nothing(package, prints, now, what):
    name, old, new = PROSE[what]
    replace(package / name, old, new)
    assert prints(package) == now


def test_a_picture_changes_nothing(package, prints, now):
    path = package / "maps.py"
    text = path.read_text()
    assert "figsize" in text
    path.write_text(text.replace("figsize", "dpi=72, figsize"))
    assert prints(package) == now


def test_a_changed_step_changes_all_trainings_and_no_test(package, prints, now):
    backward = 't.accelerator.backward({}losses["loss"])'
    replace(package / "training.py", backward.format(""), backward.format("2 * "))
    assert changed(now, prints(package)) == NOTHING | {"runs": set(now["runs"])}


def test_an_attention_changes_the_runs_that_use_it(package, prints, now, params):
    replace(package / "attention.py", "C.shape[1], L), 1 / L)", "C.shape[1], L), 1.0 / L)")
    uniform = {k for k, r in params.runs.items() if getattr(r.options, "attention", "") == "UniformAttention"}
    tests = {n for n, t in params.tests.items() if t.run in uniform}
    assert uniform and changed(now, prints(package)) == NOTHING | {"runs": uniform, "tests": tests}


def test_a_split_changes_what_is_drawn_from_it(package, prints, now, params):
    replace(package / "splits.py", "order[:1200]", "order[:1199]")
    of = lambda split: split.startswith("omniglot")
    runs = {k for k, r in params.runs.items() if of(r.split)}
    sets = {n for n, t in params.task_sets.items() if of(t.split)}
    after = changed(now, prints(package))
    assert after["runs"] == runs
    assert after["tasks"] == sets
    assert after["tests"] == {n for n, t in params.tests.items() if t.task_set in sets}



def test_a_rule_such_as_how_many_shots_train_is_part_of_it(package, prints, now):
    replace(package / "training.py", "net.way, net.shot, recipe.query", "net.way, net.shot + 1, recipe.query")
    assert changed(now, prints(package))["runs"] == set(now["runs"])


def test_a_rule_in_a_property_of_runs_is_part_of_it(package, prints, now):
    replace(package / "parameters.py", "return self.earlier | {", "return {")
    assert changed(now, prints(package))["runs"] == set(now["runs"])


def with_run(folder, **fields):
    "The parameters after fields of the run KEY have been changed in a copy of params.yaml."
    shutil.copy(ROOT / "params.yaml", folder)
    edit_params(folder, lambda p: p["runs"][KEY].update(fields))
    return load_params(folder / "params.yaml", thorough=False)


def only(key, params):
    tests = {n for n, t in params.tests.items() if t.run == key}
    return NOTHING | {"runs": {key}, "tests": tests}


def test_a_value_changes_its_run_alone(tmp_path, now, params):
    assert changed(now, all_fingerprints(with_run(tmp_path, seed=5))) == only(KEY, params)
    assert changed(now, all_fingerprints(with_run(tmp_path, seed=0, clip=0.0))) == NOTHING


def test_a_run_that_begins_from_another_changes_with_it(tmp_path, now):
    def further(**fields):
        with_run(tmp_path, **fields)
        edit_params(tmp_path, lambda p: p["runs"].update(further=p["runs"][KEY] | {"start": KEY}))
        return all_fingerprints(load_params(tmp_path / "params.yaml", thorough=False))
    first = further()
    assert changed(now, first) == NOTHING | {"runs": {"further"}}
    assert changed(first, further(seed=5))["runs"] == {KEY, "further"}


SAY = """
import json
from stanet.fingerprints import all_fingerprints
from stanet.parameters import load_params
print(json.dumps(all_fingerprints(load_params(thorough=False))))
"""


@pytest.fixture
def copy(tmp_path):
    "What fingerprints are made of, in a folder of its own."
    leave = shutil.ignore_patterns("__pycache__", "model.safetensors", "*.npz", "history.csv", "train.ipynb")
    for name in ("stanet", "nbs", "runs"): shutil.copytree(ROOT / name, tmp_path / name, ignore=leave)
    shutil.copytree(ROOT / "packs", tmp_path / "packs", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(ROOT / "results" / "cells", tmp_path / "results" / "cells")
    for name in ("params.yaml", "equivalent.csv", "fingerprints.json", "pipeline.json"):
        if (ROOT / name).is_file(): shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_an_option_and_a_field_of_recipes_at_their_neutral_values_change_nothing(copy, now, params):
    method, training = copy / "stanet" / "methods" / "stanet.py", copy / "stanet" / "training.py"
    title, base = '    "The fields of a run that are STANet\'s own."\n', "import Method, MethodOptions"
    replace(method, title, title + '    heads: Width = added(1, "attention heads")\n')
    replace(method, base, base + ", added")
    title = '    "How a network is trained."\n'
    replace(training, title, title + '    restarts: Count = added(1, "of the learning rate")\n')
    def say(): return json.loads(run(sys.executable, "-c", SAY, cwd=copy).stdout)
    assert say() == now
    edit_params(copy, lambda p: p["runs"][KEY].update(heads=2, restarts=3))
    assert changed(now, say()) == only(KEY, params)


def test_generated_files_are_up_to_date(copy, params):
    names = ("fingerprints.json", "pipeline.json")
    before = [(copy / n).read_text() for n in names]
    assert not write_generated(params, copy)
    assert [(copy / n).read_text() for n in names] == before


def test_the_file_of_a_cell_that_has_gone_is_removed(copy, params):
    write_generated(params, copy)
    cells = copy / "results" / "cells"
    before = sorted(cells.rglob("*.json"))
    (cells / "table4" / "omniglot-5w1s-stanet9-on-omniglot-5w1s.json").write_text("{}")
    write_generated(params, copy)
    assert sorted(cells.rglob("*.json")) == before


def test_a_row_makes_a_stage_and_says_so(copy, params):
    write_generated(params, copy)
    row = {"method": "STANet", "variant": "another", "task_set": "cifar-easy-5w1s", "run": KEY}
    edit_params(copy, lambda p: p["reports"]["table4"]["rows"].append(row))
    assert write_generated(load_params(copy / "params.yaml", thorough=False), copy)
    stages = json.loads((copy / "pipeline.json").read_text())
    assert stages["tests"][f"{KEY}-on-cifar-easy-5w1s"]["folder"] == f"runs/{KEY}/tests/cifar-easy-5w1s"
    assert f"{KEY}-on-cifar-easy-5w1s-in-table4" in stages["cells"]
