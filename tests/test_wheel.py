"The wheel in an environment of its own: trained networks without a clone or the packages of the pipeline."
import functools, json, shutil, subprocess, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import pytest
import torch
from PIL import Image
from conftest import ROOT
from stanet.weights import from_pretrained

UV = shutil.which("uv") or ROOT / ".uv" / "bin" / "uv"
SMALL, LARGE = "omniglot-5w1s-stanet3", "mini-5w1s-stanet1-resnet12-long"
OTHER = "mini-5w1s-stanet3-resnet12-long"
BLOCKED = "http://127.0.0.1:9"  # a port where nobody listens

PREDICT = """
import json, sys
import stanet
from PIL import Image
pictures = [Image.open(f"{i}.png") for i in range(6)]
heavy = ["accelerate", "dvc", "matplotlib", "pandas", "papermill", "scipy", "torchvision"]
said = {}
for key in sys.argv[1:]:
    try: said[key] = stanet.from_pretrained(key).predict(pictures[:5], range(5), pictures[5:])[0].tolist()
    except ValueError as error: said[key] = str(error)
said |= {"from": stanet.__file__, "heavy": [name for name in heavy if name in sys.modules]}
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    "The Python of an environment that has the wheel and what it depends on."
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "settings.ini", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "stanet", source / "stanet", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("runs", "results"): (source / name).symlink_to(ROOT / name)
    def uv(*words): subprocess.run([UV, *words], cwd=source, check=True, capture_output=True, text=True)
    uv("build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", "dist")
    wheel, = (source / "dist").glob("*.whl")
    assert wheel.stat().st_size < 10_000_000
    uv("venv", "--python", sys.executable, "env")
    lock = ROOT / "requirements.lock"
    uv("pip", "install", "--python", "env/bin/python", "--constraint", lock, wheel)
    return source / "env" / "bin" / "python"


@pytest.fixture
def empty(tmp_path, monkeypatch):
    "A folder with six pictures and nothing else; no connection leads out of it."
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "STANET_WEIGHTS"): monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy"): monkeypatch.setenv(name, BLOCKED)
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "kept"))
    folder = tmp_path / "empty"
    folder.mkdir()
    for i in range(6): Image.effect_noise((30, 30), 40 + 30 * i).convert("RGB").save(folder / f"{i}.png")
    return folder


def asked(python, folder, *keys) -> dict:
    "Each network's answer, or its one line of error."
    done = subprocess.run([python, "-c", PREDICT, *keys], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_small_weights_are_in_the_wheel(python, empty):
    found = asked(python, empty, SMALL)
    assert str(python.parents[1]) in found["from"]
    assert found["heavy"] == []
    pictures = [Image.open(empty / f"{i}.png") for i in range(6)]
    expected = from_pretrained(ROOT / "runs" / SMALL / "model.safetensors")
    expected = expected.predict(pictures[:5], range(5), pictures[5:])[0]
    assert torch.allclose(torch.tensor(found[SMALL]), expected, atol=1e-5)
    assert not (empty.parent / "kept").exists()


def test_large_weights_are_fetched_once(python, empty, monkeypatch):
    release = empty.parent / "release"
    release.mkdir()
    shutil.copy(ROOT / "runs" / LARGE / "model.safetensors", release / f"{LARGE}.safetensors")
    (release / f"{OTHER}.safetensors").write_bytes(b"other bytes")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=release)
    with ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STANET_WEIGHTS", f"http://localhost:{server.server_port}")
        first = asked(python, empty, LARGE, OTHER)
        server.shutdown()
    assert f"{OTHER}.safetensors: not fetched (invalid hash value" in first[OTHER]
    monkeypatch.delenv("STANET_WEIGHTS")
    again = asked(python, empty, LARGE, OTHER)
    assert again[LARGE] == first[LARGE]
    assert "try again, or name a folder that has it in STANET_WEIGHTS" in again[OTHER]
    assert len(list((empty.parent / "kept").rglob("*.safetensors"))) == 1


def test_commands_of_the_pipeline_say_what_is_missing(python, empty):
    done = subprocess.run([python.parent / "stanet", "check"], cwd=empty, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'stanet[pipeline]'" in done.stderr


def test_export_needs_nothing_of_the_pipeline(python, empty):
    "Without the extra `onnx`, which is named, and for a key that isn't there, it is one line."
    for key, says in ((SMALL, "pip install 'stanet[onnx]'"), ("no-such-run", "no weights for 'no-such-run'")):
        command = [python.parent / "stanet", "export", key, "net.onnx"]
        done = subprocess.run(command, cwd=empty, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert says in done.stderr
