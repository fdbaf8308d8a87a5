"A network as an ONNX file answers as `predict` does, on tasks of any size; what can't be exported says why."
import copy, json
from pathlib import Path
import numpy as np
import onnx, pytest, torch
from PIL import Image
from conftest import ROOT, run
from stanet.export import TOLERANCE, answers, session, to_onnx
from stanet.weights import as_batch, from_pretrained

REFUSED = {"maml": "it learns inside classify"}


def method_of(path) -> str:
    return json.loads(path.with_name("card.json").read_text())["run"]["method"]


def one_a_method() -> dict:
    "The first run of each method whose weights are stored: method -> key."
    paths = sorted((ROOT / "runs").glob("*/model.safetensors"))
    found = {}
    for path in paths:
        if path.parent.name.startswith(("glyphs-", "choice-")): continue
        found.setdefault(method_of(path), path.parent.name)
    return found


KEYS = one_a_method()


def pictures(n, channels, seed):
    "Pictures of strokes, of various sizes."
    random = np.random.default_rng(seed)
    made = []
    for i in range(n):
        pixels = np.full((60 + 5 * i, 90, 3), 255, np.uint8)
        for _ in range(6):
            y, x = random.integers(0, 50, 2)
            pixels[y:y + random.integers(3, 30), x:x + random.integers(3, 40)] = random.integers(0, 200, 3)
        made.append(Image.fromarray(pixels).convert({1: "L", 3: "RGB"}[channels]))
    return made


def test_all_methods_with_stored_weights_are_tried():
    assert {"stanet", "protonet", "matching", "gnn", "maml"} <= set(KEYS)


@pytest.mark.parametrize("method", sorted(KEYS.keys() - REFUSED.keys()))
def test_the_file_answers_as_predict(method, tmp_path):
    net = from_pretrained(KEYS[method])
    exact = copy.deepcopy(net).double()
    exported = to_onnx(net, tmp_path / "net.onnx")
    opened = session(exported.path)
    assert exported.difference < TOLERANCE == 1e-5
    size, channels = net.config["size"], net.config["channels"]
    way = min(net.way, 5)  # Qiao's training tasks have 64
    tasks = [(range(way), 4)]
    if not exported.only: tasks += [([0, 2, 2, 1, 1, 1, 3, 4], 1), ([*range(way)] * 4, 7)]
    if net.any_way: tasks.append((range(way + 3), 2))
    for labels, n_query in tasks:
        support, query = pictures(len(labels), channels, 0), pictures(n_query, channels, 1)
        expected = exact.predict(support, labels, query).numpy()
        as_used = net.predict(support, labels, query).numpy()
        arrays = as_batch(support, size, channels), torch.tensor(labels), as_batch(query, size, channels)
        found = answers(opened, *arrays)["probabilities"]
        assert found.shape == expected.shape
        now = (method, len(labels), n_query)
        assert np.abs(found - expected).max() < 1e-5, now
        assert np.abs(found - as_used).max() < (1e-3 if net.transductive else 1e-5), now
    if method == "snail": assert "made for 1 shot, 5 pictures: the network takes 5 support" in str(exported)
    else: assert exported.shapes["support"][0] == exported.shapes["labels"][0] == "S"
    assert exported.shapes["query"] == ("Q", channels, size, size)
    onnx.checker.check_model(str(exported.path))
    header = {p.key: p.value for p in onnx.load(exported.path).metadata_props}
    assert json.loads(header["stanet"]) == net.config
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"], "one file holds everything"


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_what_learns_from_a_task_is_refused_in_one_line(method, tmp_path):
    done = run("stanet", "export", KEYS[method], tmp_path / "net.onnx", cwd=ROOT, check=False)
    assert done.returncode == 1
    assert REFUSED[method] in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    import stanet.export as export
    net = from_pretrained(KEYS["protonet"])
    (tmp_path / "net.onnx").write_text("what was there before")
    def small_program(*_, **__):  # stands for a faulty export
        class Program:
            def save(self, path, **_): Path(path).write_text("half")
        return Program()
    monkeypatch.setattr(export, "_program", small_program)
    monkeypatch.setattr(export, "session", lambda path: None)
    monkeypatch.setattr(export, "difference", lambda *_, **__: 0.2)
    with pytest.raises(ValueError, match="not kept, as it answers by 2.0e-01 otherwise than predict"):
        to_onnx(net, tmp_path / "net.onnx")
    monkeypatch.setattr(export, "difference", lambda *_, **__: float("nan"))
    with pytest.raises(ValueError, match="not kept"): to_onnx(net, tmp_path / "net.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "what was there before"


def test_without_the_extra_the_command_says_what_to_install(tmp_path, monkeypatch):
    import stanet.export
    from stanet.cli import main
    def find(name): return None if name == "onnxruntime" else object()
    monkeypatch.setattr(stanet.export, "find_spec", find)
    monkeypatch.setattr("sys.argv", ["stanet", "export", KEYS["protonet"], str(tmp_path / "net.onnx")])
    with pytest.raises(SystemExit) as end: main()
    advice = "pip install 'stanet[onnx]' brings what an export needs"
    assert end.value.code == f"stanet: onnxruntime not installed; {advice}"
    assert list(tmp_path.iterdir()) == []


def test_bad_names_are_refused_before_work_starts(tmp_path):
    done = run("stanet", "export", "no-such-run", tmp_path / "net.onnx", cwd=ROOT, check=False)
    assert "no weights for 'no-such-run'" in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match="is a folder; name a file"):
        to_onnx(from_pretrained(KEYS["protonet"]), tmp_path)
    assert list(tmp_path.iterdir()) == []
