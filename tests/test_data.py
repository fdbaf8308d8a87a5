"""Data sets as people have them, whole and broken.

What is right becomes the same pack; what is wrong gets one line of error and leaves no file."""
import json, os, pickle, random, re, shutil, subprocess, sys, unicodedata
from itertools import product
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors import SafetensorError
from conftest import BIN, ROOT, without_power
from stanet import cli, experiment, packs, sources
from stanet.packs import load_pack, pack_digest
from stanet.splits import MINI

quickly = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty project, in a folder with spaces and other letters in its name.

    In it, the official data sets are expected to be as small as `SMALL` makes them."""
    folder = tmp_path / "projekt mit ümlaut 图"
    folder.mkdir()
    (folder / "params.yaml").write_text("{}")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sources.CIFAR100, "images", 2)
    monkeypatch.setitem(sources.MINI_IMAGENET, "images", 2)
    for half in sources.OMNIGLOT: monkeypatch.setitem(sources.OMNIGLOT, half, 2)
    for name in ("omniglot", "cifar100"):
        read, _ = sources.SOURCES[name]
        pack = read(SMALL[name](folder / "good" / name))
        monkeypatch.setitem(sources.KNOWN, name, pack_digest(pack))
    return folder


def is_error(code) -> bool:
    "Whether an exit code is one line of error; only what is wrong in params.yaml may take more lines."
    if not isinstance(code, str) or not code.startswith("stanet: "): return False
    return len(code.splitlines()) == 1 or code.startswith("stanet: params.yaml: ")


def stanet(*command) -> str:
    "The command, run in this process: its one line of error, or nothing."
    before, sys.argv = sys.argv, ["stanet", *map(str, command)]
    try: cli.main()
    except SystemExit as end:
        assert end.code in (0, None) or is_error(end.code), end.code
        return end.code or ""
    finally: sys.argv = before


def refused(place, *command) -> str:
    "The line of error; nothing that the command began may be left."
    before = sorted(place.rglob("*"))
    answer = stanet(*command)
    assert answer, f"{command} was accepted"
    assert sorted(place.rglob("*")) == before
    return answer


# ---- small data sets, the same but for the order of their images

CIFAR_COLUMNS = (b"data", b"fine_labels", b"coarse_labels", b"filenames")


def cifar_rows() -> list:
    "A row of `CIFAR_COLUMNS` for each of two images a class."
    dice = np.random.default_rng(0)
    rows = []
    for fine, i in product(range(100), range(2)):
        pixels = dice.integers(0, 256, 3072, dtype=np.uint8)
        rows.append((pixels, fine, fine // 5, b"image_%d.png" % i))
    return rows


def unchanged(name, content): return content


def small_cifar(folder, seed=0, train=150, change=unchanged):
    """CIFAR-100's three files with two images a class, in an order drawn with `seed`.

    `change` may spoil the content of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    def write(name, content): (folder / name).write_bytes(pickle.dumps(change(name, content), 2))
    rows = cifar_rows()
    random.Random(seed).shuffle(rows)
    for name, part in (("train", rows[:train]), ("test", rows[train:])):
        data, *columns = zip(*part)
        write(name, dict(zip(CIFAR_COLUMNS, (np.stack(data), *map(list, columns)))))
    write("meta", {
        b"fine_label_names": [b"class %d" % f for f in range(100)],
        b"coarse_label_names": [b"parent %d" % c for c in range(20)],
    })
    return folder


def small_omniglot(folder, seed=0):
    "Omniglot with two characters in each half."
    files = []  # path, and the seed of its pixels
    for half, c, i in product(("background", "evaluation"), (1, 2), range(20)):
        files.append((f"images_{half}/Alphabet/character0{c}/{c}_{i:02}.png", 40 * i + c))
    random.Random(seed).shuffle(files)
    for name, shade in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(shade).integers(0, 2, (105, 105), dtype=np.uint8) * 255
        Image.fromarray(pixels).convert("1").save(folder / name)
    return folder


def mini_rows(dice, classes) -> list:
    "Class, file name and picture of each of two images a class."
    rows = []
    for c, i in product(classes, (3, 11)):
        picture = dice.integers(0, 256, (84, 84, 3), dtype=np.uint8)
        rows.append((c, f"{c}{i:08}.jpg", picture))
    return rows


def write_images(folder, part, rows):
    "The images of a part of mini-ImageNet, and their list."
    lines = [f"{name},{c}\n" for c, name, _ in rows]
    (folder / f"{part}.csv").write_text("filename,label\n" + "".join(lines))
    for _, name, picture in rows:
        Image.fromarray(picture).save(folder / "images" / name, "PNG", compress_level=1)


def write_pickle(folder, part, rows):
    "A part of mini-ImageNet as one pickle: the pictures, and the positions of each class's."
    positions = {c: [] for c in MINI[part]}
    for i, (c, _, _) in enumerate(rows): positions[c].append(i)
    content = {"image_data": np.stack([picture for *_, picture in rows]), "class_dict": positions}
    (folder / f"mini-imagenet-cache-{part}.pkl").write_bytes(pickle.dumps(content))


def small_mini(folder, seed=0, form="images"):
    "mini-ImageNet with two images a class, as images with lists or as pickles."
    (folder / "images").mkdir(parents=True, exist_ok=True)
    write = write_images if form == "images" else write_pickle
    dice = np.random.default_rng(0)
    for part, classes in MINI.items():
        rows = mini_rows(dice, classes)
        random.Random(seed).shuffle(rows)
        write(folder, part, rows)
    return folder


def small_tree(folder, seed=0, parents=("tools", "früchte"), classes=6, images=4):
    "Images of one's own: a folder for each parent category, and in it one for each class."
    files = []
    for parent, c, i in product(parents, range(classes), range(images)):
        suffix = ("png", "bmp", "gif")[i % 3]
        files.append((parent, f"class {c}", f"picture {i}.{suffix}"))
    random.Random(seed).shuffle(files)
    for parts in files:
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        dice = np.random.default_rng(sum("/".join(parts).encode()))
        pixels = dice.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


SMALL = {"omniglot": small_omniglot, "cifar100": small_cifar, "mini": small_mini, "my-own": small_tree}


# ---- the same images in any order are the same pack

@pytest.mark.parametrize("name", SMALL)
def test_order_of_the_source_does_not_matter(place, name):
    written = []
    for seed in range(2):
        shutil.rmtree(place / "raw", ignore_errors=True)
        assert stanet("data", "import", name, SMALL[name](place / "raw", seed=seed)) == ""
        written.append((place / "data" / f"{name}.safetensors").read_bytes())
    assert written[0] == written[1]


@given(seed=st.integers(0, 10**6), train=st.integers(1, 199))
@settings(quickly, max_examples=10)
def test_any_order_of_cifar(place, seed, train):
    pack = sources.read_source("cifar100", small_cifar(place / "raw", seed, train))
    assert pack_digest(pack) == sources.KNOWN["cifar100"]


def test_pickled_mini_is_the_same_in_any_order(place):
    def digest(seed):
        source = small_mini(place / f"raw{seed}", seed, form="pickles")
        return pack_digest(sources.read_mini(source))
    assert digest(0) == digest(1)


def test_everything_below_one_folder(place, capsys):
    for name in ("omniglot", "cifar100", "mini"): SMALL[name](place / "raw" / f"my {name}")
    half = place / "raw" / "my omniglot" / "images_evaluation"
    half.rename(place / "later")
    assert "Omniglot has" in stanet("data", "import", "all", place / "raw")

    (place / "later").rename(half)
    assert stanet("data", "import", "all", place / "raw") == ""
    assert stanet("data", "list") == ""
    written = sorted(p.name for p in (place / "data").iterdir())
    assert written == ["cifar100.safetensors", "mini.safetensors", "omniglot.safetensors"]

    capsys.readouterr()
    assert stanet("data", "import", "all", place / "raw") == ""
    assert capsys.readouterr().out.count("is there") == 3


# ---- pickles

class Call:
    "Pickles as a call of `function`."
    def __init__(self, function, *arguments): self.call = function, arguments
    def __reduce__(self): return self.call


def as_opcode(text) -> bytes:
    "What puts `text` on the stack of whoever reads the pickle."
    return b"V" + text.encode("unicode-escape") + b"\n"


POISONS = {  # pickles that would make the folder `mark`, or call what they must not
    "mkdir": lambda mark: pickle.dumps({b"data": Call(os.mkdir, mark)}, 2),
    "eval": lambda mark: pickle.dumps({b"data": Call(eval, f"__import__('os').mkdir({mark!r})")}, 4),
    "ndarray": lambda mark: pickle.dumps({b"data": Call(np.ndarray, (1,)), b"x": Call(os.mkdir, mark)}, 2),
    "global": lambda mark: b"cos\nmkdir\n(" + as_opcode(mark) + b"tR.",
    "inst": lambda mark: b"(" + as_opcode(mark) + b"ios\nmkdir\n.",
    "stack-global": lambda mark: b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
    "dotted": lambda mark: b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__base__\x93)R.",
    "object-array": lambda mark: pickle.dumps({b"data": np.array([Call(os.mkdir, mark)], dtype=object)}, 2),
    "persistent": lambda mark: b"Pid\n.",
}


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
@pytest.mark.parametrize("name, file", [
    ("cifar100", "train"),
    ("cifar100", "meta"),
    ("mini", "mini-imagenet-cache-val.pkl"),
])
def test_poisoned_pickle_runs_nothing(place, poison, name, file):
    if name == "cifar100": source = small_cifar(place / "raw")
    else: source = small_mini(place / "raw", form="pickles")
    mark = place / "mark"
    (source / file).write_bytes(poison(str(mark)))
    answer = refused(place, "data", "import", name, source)
    assert f"{source / file}: not a readable pickle" in answer
    assert "get the file again" in answer
    assert not mark.exists()


def cut_or_changed(data, whole: bytes, head: int) -> bytes:
    """`whole`, cut anywhere or with one bit changed.

    Half of the changes are in its first `head` bytes, where the schema is."""
    if data.draw(st.booleans()): return whole[:data.draw(st.integers(0, len(whole) - 1))]
    edge = data.draw(st.sampled_from([head, len(whole)]))
    position = data.draw(st.integers(0, min(edge, len(whole)) - 1))
    broken = bytearray(whole)
    broken[position] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(broken)


@given(data=st.data())
@settings(quickly, max_examples=150)
def test_no_changed_byte_of_cifar_is_accepted(place, data):
    "Cut or changed anywhere, the archive is refused, or gives the very same pack."
    source, pack = place / "good" / "cifar100", place / "data" / "cifar100.safetensors"
    name = data.draw(st.sampled_from(["train", "test", "meta"]))
    whole = (source / name).read_bytes()
    broken = cut_or_changed(data, whole, head=600)
    try:
        (source / name).write_bytes(broken)
        answer = stanet("data", "import", "cifar100", source)
        if answer: assert str(source) in answer or "an image, label or name differs" in answer
        else: assert pack_digest(load_pack(pack)) == sources.KNOWN["cifar100"]
    finally:
        (source / name).write_bytes(whole)
        shutil.rmtree(place / "data", ignore_errors=True)


def without(key):
    "A change of `small_cifar` that leaves `key` out."
    return lambda name, content: {k: v for k, v in content.items() if k != key}


def altered(key, new):
    "A change of `small_cifar` that applies `new` to the value of `key`."
    def change(name, content):
        return content | {key: new(content[key])} if key in content else content
    return change


@pytest.mark.parametrize("change", [
    without(b"data"),
    without(b"fine_labels"),
    without(b"filenames"),
    without(b"coarse_label_names"),
    altered(b"data", lambda d: d[:, :3000]),
    altered(b"data", lambda d: d.astype(np.float32)),
    altered(b"data", lambda d: d.tolist()),
    altered(b"data", lambda d: d[1:]),
    altered(b"fine_labels", lambda l: [x + 1 for x in l]),
    altered(b"fine_labels", lambda l: ["a"] * len(l)),
    altered(b"coarse_labels", lambda l: l[::-1]),
    altered(b"fine_labels", lambda l: None),
    altered(b"filenames", lambda l: [b"a.png"] * len(l)),
    altered(b"filenames", lambda l: [b"\xff" + n for n in l]),
    altered(b"fine_label_names", lambda l: [b"twice"] * 100),
    altered(b"fine_label_names", lambda l: l[::-1]),
    lambda name, content: [1, 2, 3],
], ids=range(17))
def test_wrong_schema_or_labels_of_cifar(place, change):
    answer = refused(place, "data", "import", "cifar100", small_cifar(place / "raw", change=change))
    if "an image, label or name differs" in answer: return
    assert "raw" in answer
    assert "again" in answer


# ---- files that are not what they say

PAGE = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


@pytest.mark.parametrize("name, file, says", [
    ("cifar100", "test", "not a readable pickle"),
    ("cifar100", "meta", "not a readable pickle"),
    ("omniglot", "images_background/Alphabet/character01/1_05.png", "not a readable image"),
    ("mini", "images/n0153282900000003.jpg", "not a readable image"),
    ("mini", "val.csv", "its first line is not 'filename,label'"),
    ("my-own", "tools/class 1/picture 0.png", "not a readable image"),
])
def test_page_saved_under_the_name_of_data(place, name, file, says):
    source = SMALL[name](place / "raw")
    (source / file).write_bytes(PAGE)
    answer = refused(place, "data", "import", name, source)
    assert str(source / file) in answer
    assert says in answer


def test_bombs_and_odd_images(place):
    source = small_tree(place / "raw")
    Image.new("1", (20000, 20000)).save(source / "tools/class 1/bomb.png")
    Image.new("I;16", (9, 9)).save(source / "tools/class 1/deep.png")
    (source / "tools/class 1/empty.png").touch()
    answer = refused(place, "data", "import", "my-own", source)
    for name in ("bomb.png", "deep.png", "empty.png"): assert name in answer
    assert "replace or remove" in answer


def cut_and_changed(data, whole: bytes) -> bytes:
    "The first bytes of `whole`, with up to five of the first hundred changed."
    broken = bytearray(whole[:data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 5))):
        if not broken: continue
        position = data.draw(st.integers(0, min(99, len(broken) - 1)))
        broken[position] = data.draw(st.integers(0, 255))
    return bytes(broken)


@given(data=st.data())
@settings(quickly, max_examples=60)
def test_broken_images_never_raise_anything_else(place, data):
    source = place / "tree"
    if not source.exists(): small_tree(source)
    number = data.draw(st.integers(0, 2))
    path = next((source / "tools/class 1").glob(f"picture {number}.*"))
    whole = path.read_bytes()
    broken = cut_and_changed(data, whole)
    try:
        path.write_bytes(broken)
        try: sources.decode(path, 16, "RGB")
        except ValueError as error:
            assert str(path) in str(error)
            assert len(str(error).splitlines()) == 1
    finally: path.write_bytes(whole)


def without_last_line(text): return "\n".join(text.splitlines()[:-1]) + "\n"


def rename_class(source, old, new):
    "Give a class of mini-ImageNet another name, in the lists and in the names of its images."
    for part in ("train", "val"):
        text = (source / f"{part}.csv").read_text()
        (source / f"{part}.csv").write_text(text.replace(old, new))
    for path in (source / "images").glob(f"{old}*"):
        path.rename(path.with_name(path.name.replace(old, new)))


def test_lists_of_mini_that_lie(place):
    lies = [
        (lambda t: t.replace(",n01855672", ",n02091244", 1), "not a file such as"),
        (lambda t: t.replace("filename,label", "a,b"), "its first line"),
        (lambda t: t.replace("n01855672", "../../etc", 1), "not a file such as"),
        (lambda t: t + "\0", "val.csv: "),
        (lambda t: t + t.splitlines()[-1] + "\n", "3 a class"),
        (without_last_line, "complete the files"),
    ]
    for change, says in lies:
        source = small_mini(place / "raw")
        (source / "val.csv").write_text(change((source / "val.csv").read_text()))
        assert says in refused(place, "data", "import", "mini", source)
        shutil.rmtree(source)

    source = small_mini(place / "raw")
    rename_class(source, "n01855672", "n99999999")
    answer = refused(place, "data", "import", "mini", source)
    assert "the split of mini-ImageNet needs its 100 classes" in answer
    shutil.rmtree(source)

    source = small_mini(place / "raw")
    for path in list((source / "images").glob("n0185567*"))[:2]: path.unlink()
    answer = refused(place, "data", "import", "mini", source)
    assert "no such file, and 1 more of 200 are missing" in answer


def test_places_that_hold_no_data(place):
    (place / "empty").mkdir()
    (place / "archive.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    names = ("omniglot", "cifar100", "mini", "my-own", "all")
    for name, source in product(names, ("empty", "absent", "archive.zip")):
        assert source in refused(place, "data", "import", name, place / source)
    for name in ("My own", "../up", "a/b", ""):
        answer = refused(place, "data", "import", name, place / "empty")
        assert "lowercase letters, digits and hyphens" in answer
    for size in (0, 10**6):
        source = small_tree(place / f"raw{size}")
        answer = refused(place, "data", "import", "my-own", source, "--size", size)
        assert "is not between 4 and 1024" in answer


# ---- trees of one's own

def keep_images(folder, count):
    for path in sorted(folder.iterdir())[count:]: path.unlink()


def test_trees_that_are_not_one(place):
    def spoil(change, says):
        source = small_tree(place / "raw")
        change(source)
        assert says in refused(place, "data", "import", "my-own", source)
        shutil.rmtree(source)
    few = "class 1: too few images ({}); a task needs at least two"
    spoil(lambda s: keep_images(s / "tools/class 1", 0), few.format(0))
    spoil(lambda s: keep_images(s / "tools/class 1", 1), few.format(1))
    spoil(lambda s: (s / "tools/class 1/notes.txt").write_text("a"), "notes.txt: not an image file")
    spoil(lambda s: (s / "tools/class 1/deeper").mkdir(), "deeper: not an image file")
    spoil(lambda s: (s / "tools/loose.png").write_bytes(b""), "loose.png: a file beside class folders")
    spoil(lambda s: shutil.copytree(s / "tools/class 1", s / "flat"), "throughout")
    spoil(lambda s: (s / "tools/class 1").rename(s / "tools/a\nb"), "control characters in its name")
    latin1 = b"/caf\xe9"
    spoil(lambda s: os.rename(s / "tools/class 1", os.fsencode(s / "tools") + latin1), "not valid UTF-8")
    twin = unicodedata.normalize("NFD", "früchte")  # reads the same, written in other bytes
    spoil(lambda s: shutil.copytree(s / "früchte", s / twin), "in another Unicode form")
    spoil(lambda s: (s / "tools/class 1/a.png").symlink_to(s / "gone.png"), "a.png: not a readable image")
    spoil(lambda s: (s / "tools/class 1/again").symlink_to(s / "tools"), "again: not an image file")
    spoil(lambda s: (s / "früchte/round").symlink_to(s), "round")


def test_links_and_clutter_are_no_obstacle(place):
    source = small_tree(place / "raw")
    expected = pack_digest(sources.read_folder(source, 16, "my-own"))
    shutil.move(source / "tools/class 1", place / "elsewhere")
    (source / "tools/class 1").symlink_to(place / "elsewhere")
    for name in (".DS_Store", "Thumbs.db"): (source / "früchte/class 2" / name).write_bytes(b"x")
    (place / "link").symlink_to(source)
    assert stanet("data", "import", "my-own", place / "link", "--size", 16) == ""
    assert pack_digest(load_pack(place / "data/my-own.safetensors")) == expected


def said(capsys, *command) -> str:
    "What a command prints; it must end well."
    capsys.readouterr()
    assert stanet(*command) == ""
    return capsys.readouterr().out


def waves(seed) -> Image.Image:
    "A smooth picture, which JPEG hardly changes."
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((60, 60), Image.Resampling.BICUBIC)


def test_what_systems_leave_is_passed_over_and_counted(place, capsys):
    source = small_tree(place / "raw")
    expected = pack_digest(sources.read_folder(source, 16, "my-own"))
    for name in ("__MACOSX/tools/class 1/._picture 0.png", "früchte/@eaDir/picture.png",
                 "tools/class 1/@eaDir/SYNO.jpg", "tools/class 1/thumbs.db", "tools/DESKTOP.INI"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"x")
    text = said(capsys, "data", "import", "my-own", source, "--size", 16)
    assert "passed over, since systems leave them: 5, such as __MACOSX" in text
    assert pack_digest(load_pack(place / "data/my-own.safetensors")) == expected


def test_jfif_and_avif_are_pictures(place):
    source = small_tree(place / "raw", classes=1, images=2)
    for name, form in (("0.png", "PNG"), ("1.avif", "AVIF"), ("2.jfif", "JPEG")):
        waves(3).save(source / "tools/class 0" / name, form, quality=95)
    assert stanet("data", "import", "my-own", source, "--size", 16) == ""
    pack = load_pack(place / "data/my-own.safetensors")
    png, avif, jfif, *_ = pack.images[pack.labels == pack.classes.index("tools/class 0")].int()
    for other in (avif, jfif): assert (other - png).abs().float().mean() < 8


def test_repeats_are_told(place, capsys):
    source = small_tree(place / "raw", classes=5, images=2)
    shutil.copy(source / "tools/class 1/picture 0.png", source / "tools/class 1/z.png")
    shutil.copy(source / "tools/class 2/picture 0.png", source / "früchte/class 2/z.png")
    waves(5).save(source / "tools/class 3/drawn.png")
    waves(5).resize((50, 50)).save(source / "tools/class 3/smaller.jpg", quality=70)
    expected = [
        "equal images in one class: 1, such as tools/class 1/picture 0.png and tools/class 1/z.png",
        "equal images in two classes: 1, such as früchte/class 2/z.png and tools/class 2/picture 0.png",
        "nearly equal images in one class: 1, such as "
        "tools/class 3/drawn.png and tools/class 3/smaller.jpg",
    ]
    text = said(capsys, "data", "import", "my-own", source)
    for line in expected: assert line in text
    text = said(capsys, "data", "verify", "my-own")
    for line in expected: assert line.split(", such as")[0] in text
    assert "such as image 1 of 'tools/class 1' and image 3 of 'tools/class 1'" in text
    assert "nearly equal images in two classes" not in text


def test_small_classes_are_named_and_left_out(place, capsys):
    source = small_tree(place / "raw", images=20)
    keep_images(source / "tools/class 1", 1)
    keep_images(source / "tools/class 2", 5)
    answer = refused(place, "data", "import", "my-own", source)
    assert "class 1: too few images (1)" in answer
    assert "--min-images 2" in answer
    text = said(capsys, "data", "import", "my-own", source, "--size", 16, "--min-images", 2)
    assert "left out, with fewer than 2 images: 'tools/class 1' (1)" in text
    assert "fewer than 16 images, which 1 shot and 15 queries need: 'tools/class 2' (5)" in text
    text = said(capsys, "data", "import", "my-own", source, "--size", 16, "--min-images", 16)
    assert "left out, with fewer than 16 images: 'tools/class 1' (1), 'tools/class 2' (5)" in text
    assert "fewer than 16 images, which" not in text
    kept = load_pack(place / "data/my-own.safetensors").classes
    assert len(kept) == 10
    assert not {"tools/class 1", "tools/class 2"} & set(kept)


def test_min_images_that_make_no_sense(place):
    source = small_tree(place / "raw")
    for n, says in ((1, "1 is too few"), (50, "none of its 12 classes has 50 images")):
        assert says in refused(place, "data", "import", "my-own", source, "--min-images", n)
    answer = refused(place, "data", "import", "omniglot", place / "good/omniglot", "--min-images", 5)
    assert "--min-images is for your own images" in answer


# ---- where the pack goes

def test_targets_that_cannot_be_written(place, monkeypatch):
    source = small_tree(place / "raw")
    (place / "data").write_text("in the way")
    assert "data: " in refused(place, "data", "import", "my-own", source)
    (place / "data").unlink()
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    def locked(*_, **__): raise PermissionError(13, "Permission denied", str(place / "data"))
    failures = [
        (packs, "save_file", full, "No space left on device"),
        (cli.tempfile, "TemporaryFile", locked, "Permission denied"),
    ]
    for module, name, error, says in failures:
        with monkeypatch.context() as m:
            m.setattr(module, name, error)
            answer = refused(place, "data", "import", "my-own", source)
        assert says in answer
        assert "has room" in answer


def test_read_only_folder(place):
    source = small_tree(place / "raw")
    (place / "data").mkdir(mode=0o555)
    done = subprocess.run(
        [BIN / "stanet", "data", "import", "my-own", source],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=without_power,
    )
    assert done.returncode == 1
    advice = "Permission denied; see that it can be read and written and has room"
    assert re.fullmatch(rf"stanet: .*data.*: {advice}", done.stderr.strip().splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert list((place / "data").iterdir()) == []


def test_interrupted_import_leaves_the_old_pack(place, monkeypatch):
    source, pack = small_tree(place / "raw"), place / "data/my-own.safetensors"
    assert stanet("data", "import", "my-own", source) == ""
    before = pack.read_bytes()
    def interrupted(*_, **__): raise KeyboardInterrupt
    for module, name in ((sources, "decode"), (packs, "save_file")):
        with monkeypatch.context() as m:
            m.setattr(module, name, interrupted)
            with pytest.raises((KeyboardInterrupt, AssertionError)):
                stanet("data", "import", "my-own", source)
        assert list((place / "data").iterdir()) == [pack]
        assert pack.read_bytes() == before

    killed, running = place / "data/.my-own.safetensors.abc", place / "data/.my-own.safetensors.def"
    for path in (killed, running): path.write_bytes(b"half")
    os.utime(killed, (0, 0))
    assert stanet("data", "import", "my-own", source) == ""
    assert not killed.exists()
    assert running.exists()


# ---- what verify says

def damage_all(folder):
    "Another pixel in the pack of CIFAR-100, no pack of Omniglot, another last bit in mini-ImageNet's file."
    changed = load_pack(folder / "cifar100.safetensors")
    changed.images[5, 0, 0, 0] ^= 1
    packs.save_pack(changed, folder / "cifar100.safetensors")
    (folder / "omniglot.safetensors").unlink()
    torn = bytearray((folder / "mini.safetensors").read_bytes())
    torn[-1] ^= 1
    (folder / "mini.safetensors").write_bytes(torn)


def test_verify(place, capsys, monkeypatch):
    for name in ("omniglot", "cifar100", "mini"):
        assert stanet("data", "import", name, SMALL[name](place / "raw" / name)) == ""
    monkeypatch.setitem(cli.SUMMARIES, "omniglot", {})  # the small Omniglot has no test characters
    capsys.readouterr()
    assert stanet("data", "verify") == ""
    said = capsys.readouterr().out
    assert said.count("in order") == 3
    assert "80/0/20 classes of 16/0/4 parents" in said
    assert "not byte for byte the pack" in said

    damage_all(place / "data")
    assert stanet("data", "verify") == "stanet: 3 of 3 packs are missing or deviate, see above"
    said = capsys.readouterr().out
    assert "data/omniglot.safetensors is missing; `stanet data download omniglot`" in said
    assert "an image, label or name differs; get the official files again" in said
    assert "digest differs); remove it and import it again" in said


@given(data=st.data())
@settings(quickly, max_examples=100)
def test_no_changed_byte_of_a_pack_is_accepted(place, data):
    path = place / "own.safetensors"
    if not path.exists():
        pack = sources.read_folder(small_tree(place / "tree"), 16, "own")
        packs.save_pack(pack, path)
    whole, known = path.read_bytes(), pack_digest(load_pack(path))
    broken = cut_or_changed(data, whole, head=900)
    try:
        path.write_bytes(broken)
        try: assert pack_digest(load_pack(path)) == known
        except ValueError as error:
            assert str(path) in str(error)
            assert "import it again" in str(error)
            assert len(str(error).splitlines()) == 1
    finally: path.write_bytes(whole)


# ---- from a folder of images to a run

OWN = """
recipes:
  short: {steps: 5, tasks: 2, query: 2}
task_sets:
  my-own-2w1s: {pack: my-own, split: folder, way: 2, shot: 1, query: 3, n: 50}
runs:
  my-own-2w1s:
    recipe: short
    pack: my-own
    split: folder
    way: 2
    shot: 1
    width: 8
    pools: 2
    layers: 1
    d_k: 8
    d_v: 8
"""


def test_own_images_make_a_run(place):
    "What the pipeline's stages do for a run, without the notebook."
    (place / "params.yaml").write_text(OWN)
    assert stanet("data", "import", "my-own", small_tree(place / "raw", images=8), "--size", 24) == ""
    assert stanet("check") == ""
    assert stanet("tasks", "my-own-2w1s") == ""
    assert stanet("fit", "my-own-2w1s") == ""
    chosen, pack = cli.find_run("my-own-2w1s"), load_pack(place / "data/my-own.safetensors")
    net, history, trained = experiment.fit(chosen, pack)  # finished already, and found
    experiment.record(chosen, net, history, trained, pack)
    assert stanet("test", "my-own-2w1s", "my-own-2w1s") == ""
    folder = place / "runs/my-own-2w1s/tests/my-own-2w1s"
    assert len(experiment.read_correct(folder)) == 50
    assert json.loads((folder / "metrics.json").read_text())["queries"] == 6


def test_classes_too_small_for_the_tasks_are_named(place):
    (place / "params.yaml").write_text(OWN.replace("query: 3", "query: 9"))
    assert stanet("data", "import", "my-own", small_tree(place / "raw", images=4), "--size", 24) == ""
    few = "shot and queries make 10 images a class, but the smallest test class has 4"
    answer = stanet("tasks", "my-own-2w1s")
    assert f"task_sets.my-own-2w1s.shot: {few}" in answer
    smallest = re.search(r"has 4 \('(.*?)'\)", answer)[1]
    assert smallest in load_pack(place / "data/my-own.safetensors").classes
    assert "`stanet data import my-own FOLDER --min-images 10` leaves such classes out" in answer


BEGUN = """
  others-2w1s:
    recipe: short
    pack: others
    split: folder
    way: 2
    width: 8
    pools: 2
    layers: 1
    d_k: 8
    d_v: 8
    steps: 1
    lr: 1.0e-12
    weight_decay: 0.0
    start: my-own-2w1s
    semantic_weight: 0.0
"""


def trained(key):
    "What `stanet train` does for a run, without the notebook."
    chosen = cli.find_run(key)
    pack = load_pack(cli.pack_path(chosen.pack))
    net, history, about = experiment.fit(chosen, pack)
    experiment.record(chosen, net, history, about, pack)
    return net


def test_training_goes_on_from_weights_of_other_images(place):
    (place / "params.yaml").write_text(OWN)
    assert stanet("data", "import", "my-own", small_tree(place / "raw", images=8), "--size", 24) == ""
    source = small_tree(place / "more", parents=("birds",), classes=11, images=8)
    assert stanet("data", "import", "others", source, "--size", 32) == ""
    first = trained("my-own-2w1s")

    (place / "params.yaml").write_text(OWN + BEGUN.replace("    semantic_weight: 0.0\n", ""))
    answer = stanet("fit", "others-2w1s")
    assert "start: the weights of my-own-2w1s don't fit: semantic.W_sem.weight is (10, 8)" in answer
    answer = stanet("check")
    assert "runs.others-2w1s.start: the semantic branch has 9 classes here and 10 in my-own-2w1s" in answer
    assert "`semantic_weight: 0.0` begins from all other weights" in answer

    (place / "params.yaml").write_text(OWN + BEGUN)
    second = trained("others-2w1s")
    assert second.semantic is None
    weights = first.state_dict()
    for name, tensor in second.named_parameters():
        assert (tensor - weights[name]).abs().max() < 1e-3, name  # kept in half precision between them
