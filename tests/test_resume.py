"A training killed at any moment ends with the weights of an undisturbed one: of one stage, and of two."
import os, random, signal, subprocess, sys, time
import pytest
from conftest import ROOT, clone, edit_params, run

ONE, TWO = "glyphs-5w1s-stanet3", "glyphs-two-stages"
FIT = """
import sys, stanet.experiment as e
from stanet.parameters import find_run
from stanet.glyphs import glyphs
from stanet.packs import digest
from stanet.training import Pace
print("started", flush=True)
pace = Pace(every=5, save_seconds=0.0)  # a state at every row of the history
net, history, _ = e.fit(find_run(sys.argv[1]), glyphs(classes=12, per_class=8), pace)
print("weights", digest(*net.state_dict().values()), digest(text=history.to_csv()), flush=True)
"""
TWO_STAGES = '''"A classifier first; then, on its features computed once, a scaled nearest mean."
import torch
import torch.nn.functional as F
from torch import nn
from stanet.losses import task_loss
from stanet.method import Method, MethodOptions, share_correct, gather_maps


class TwoStages(Method):
    stages, cached, any_way = ("classes", "meta"), ("meta",), True

    def setup(self): self.W = nn.Linear(self.backbone.n_ch, self.classes)

    def begin(self, stage):
        super().begin(stage)
        if stage == "classes": return
        self.scale = nn.Parameter(torch.tensor(1.0))
        for p in self.backbone.parameters(): p.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.stage == "meta": self.backbone.eval()
        return self

    def classify(self, support, labels, query):
        member = F.one_hot(labels.long()).to(support.dtype)
        means = torch.einsum("bsw,bsc->bwc", member, support.mean((-2, -1))) / member.sum(1)[..., None]
        return -self.scale * torch.cdist(query.mean((-2, -1)), means)

    def forward(self, batch):
        if self.stage == "classes":
            logits = self.W(self.embed(batch.images).float().mean((-2, -1)))
            loss = F.cross_entropy(logits, batch.classes)
            return {"loss": loss, "accuracy": (logits.argmax(-1) == batch.classes).float().mean()}
        tasks, maps = batch.tasks, batch.images
        own = self.W(maps.mean((-2, -1)))
        apart = (batch.classes[batch.others][..., None] != batch.classes[tasks.support][:, None]).all()
        assert apart, "images beside a task are of its classes"
        support, query = gather_maps(maps, tasks.support), gather_maps(maps, tasks.query)
        logits, others = self.classify(support, tasks.support_labels, query), batch.others.flatten()
        loss = task_loss(logits, tasks.query_labels) + F.cross_entropy(own[others], batch.classes[others])
        return {"loss": loss, "accuracy": share_correct(logits, tasks.query_labels)}
'''


def small(params):
    params["recipes"]["quick"].update(steps=150, tasks=2, regroupings=2, query=2)
    both = dict(steps=60, weight_decay=0.0, precision="float32")
    sgd = dict(sampler="images", images=16, optimiser="sgd", lr=0.05, clip=1.0)
    tasks = dict(tasks=2, query=2, others=3, one_query=False, classes="uniform", lr=1e-2)
    params["recipes"] |= {"two-classes": both | sgd, "two-meta": both | tasks}
    params["runs"][ONE].update(width=8, d_k=8, d_v=8)
    recipes = {"classes": "two-classes", "meta": "two-meta"}
    general = dict(method="twostages", pack="glyphs", split="glyphs", width=8, pools=3, semantic_weight=0.0)
    params["runs"][TWO] = general | {"recipe": recipes}
    params["runs"][f"{TWO}-5s"] = general | {"recipe": recipes, "shot": 5}


def start(folder, key):
    env = os.environ | {"PYTHONPATH": str(folder)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", FIT, key], cwd=folder, env=env, **pipes)


def finish(folder, key):
    out, err = start(folder, key).communicate()
    assert "weights" in out, err[-3000:]
    return out.strip().splitlines()[-1]


def project(folder):
    clone(folder, without=("runs/",))
    edit_params(folder, small)
    (folder / "stanet" / "methods" / "twostages.py").write_text(TWO_STAGES)
    return folder


def steps_of(folder, stage):  # of the states on disk, newest last
    states = sorted((folder / "scratch").glob(f"*-{stage}-*/step-*.safetensors"))
    return [int(p.stem.split("-")[1]) for p in states]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp("resume") / "whole")
    return folder, {key: finish(folder, key) for key in (ONE, TWO)}


def kill_in(folder, key, stage, dice, further=0):
    "Kill a training when it is past the step `further` of the stage; returns the step of its last state."
    process = start(folder, key)
    while process.poll() is None:
        if max(steps_of(folder, stage), default=0) > further: break
        time.sleep(0.01)
    time.sleep(dice.random() * 0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return max(steps_of(folder, stage), default=0)


@pytest.mark.parametrize("seed", range(2))
def test_killed_and_resumed(tmp_path, whole, seed):
    folder, dice = project(tmp_path / "killed"), random.Random(seed)
    first = kill_in(folder, ONE, "meta", dice)
    assert 0 < first < 150, "the training was over before it was killed"
    kill_in(folder, ONE, "meta", dice, first)
    assert finish(folder, ONE) == whole[1][ONE]


@pytest.mark.parametrize("stage", ["classes", "meta"])
def test_killed_in_a_stage_and_resumed(tmp_path, whole, stage):
    folder = project(tmp_path / "killed")
    assert kill_in(folder, TWO, stage, random.Random(0)) > 0
    assert finish(folder, TWO) == whole[1][TWO]


def test_a_classifier_is_trained_once_for_all_shots(whole):
    folder, _ = whole
    classifiers = lambda: {p.name for p in (folder / "scratch").glob("*-classes-*")}
    before = classifiers()
    said = start(folder, f"{TWO}-5s").communicate()[0]
    assert "weights" in said and classifiers() == before and len(before) == 1
    assert len(list((folder / "scratch").glob("*-twostages-meta-*"))) == 2


GROWTH = """
import psutil, tempfile
from stanet.bench import SETTINGS, our_steps
small = SETTINGS["conv64-28"] | {"size": 8, "pools": 2, "tasks": 1}
steps, _ = our_steps(small, "float32", tempfile.gettempdir())
steps(100)  # what is kept for reuse is there now
before = psutil.Process().memory_info().rss
steps(300)
print(psutil.Process().memory_info().rss - before)
"""


def test_memory_does_not_grow_with_the_steps():
    "The maps of one layer in a step are 30 images of 64 channels and 64 sites, 490 kB: kept, they are seen."
    grown = int(run(sys.executable, "-c", GROWTH, cwd=ROOT).stdout)
    assert grown < 4e6, f"{grown / 300:,.0f} bytes a step"
