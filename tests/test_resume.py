"A run killed at any moment ends with the weights of the one that was left alone."
import json, os, random, signal, subprocess, sys, time
import pytest
from conftest import clone, edit_params, run

KEY = "glyphs-5w1s-stanet3"
FIT = """
import sys, stanet.experiment as e, stanet.training as t
from stanet.parameters import find_run
from stanet.glyphs import glyphs
from stanet.packs import digest
t.train.__defaults__ = tuple(0.0 if d == 30.0 else 5 if d == 50 else d for d in t.train.__defaults__)  # a state at every row of the history, a row every 5 steps
print("started", flush=True)
net, history, _ = e.fit(find_run(sys.argv[1]), glyphs(classes=12, per_class=8))
print("weights", digest(*net.state_dict().values()), digest(text=history.to_csv()), flush=True)
"""


def small(params):
    params["recipes"]["quick"].update(steps=150, tasks=2, mix=2, query=2)
    params["runs"][KEY].update(width=8, d_k=8, d_v=8)


def start(folder):
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.Popen([sys.executable, "-c", FIT, KEY], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder):
    out, err = start(folder).communicate()
    assert "weights" in out, err[-3000:]
    return out.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = clone(tmp_path_factory.mktemp("resume") / "whole")
    edit_params(folder, small)
    return finish(folder)


@pytest.mark.parametrize("seed", range(3))
def test_killed_and_resumed(tmp_path, whole, seed):
    folder = clone(tmp_path / "killed")
    edit_params(folder, small)
    dice, steps = random.Random(seed), []
    for _ in range(2):
        process = start(folder)
        seen = max(steps, default=0)
        while process.poll() is None:  # until it has gone a little further than last time
            states = sorted((folder / "scratch").glob("*/step-*.safetensors"))
            if states and int(states[-1].stem.split("-")[1]) > seen: break
            time.sleep(0.01)
        time.sleep(dice.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps.append(int(sorted((folder / "scratch").glob("*/step-*.safetensors"))[-1].stem.split("-")[1]))
    assert steps[0] < 150, "the run was over before it was killed"
    assert finish(folder) == whole
