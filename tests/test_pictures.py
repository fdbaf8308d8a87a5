"Pictures as people have them: import and prediction see the same pixels, or both refuse."
import numpy as np
import pytest
from PIL import Image
from stanet.classifier import read_pixels
from stanet.sources import decode
from stanet.weights import as_batch

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F")


def picture_in(mode):
    "A small picture whose sides differ, with a transparent corner where the mode has transparency."
    numbers = np.arange(20 * 14, dtype=np.uint8).reshape(14, 20) // 2
    if mode in ("I;16", "I", "F"): return Image.fromarray(numbers.astype(np.uint16) * 200).convert(mode)
    if mode == "LAB": return Image.merge("LAB", [Image.fromarray(numbers)] * 3)
    clear = Image.fromarray(numbers).convert("RGBA")
    clear.putpixel((0, 0), (0, 200, 0, 0))
    return clear.convert("LA" if mode == "LA" else "RGBA" if mode == "RGBA" else "RGB").convert(mode)


def unless_refused(act, *given):  # what it returns, or None where it is refused
    try: return act(*given)
    except ValueError: return None


def opened(path, size, mode):  # the pixels of a picture that a caller opens
    try: picture = Image.open(path)
    except (OSError, SyntaxError, Image.DecompressionBombError): return None  # Pillow's own refusals
    with picture: batch = as_batch([picture], size, {"L": 1, "RGB": 3}[mode])
    return (batch[0] * 255).round().byte().permute(1, 2, 0).numpy()


def all_ways(path, mode="RGB"):
    "The pixels of a file, or None where it is refused: by import, by `stanet predict`, by `predict`."
    return [unless_refused(act, path, 12, mode) for act in (decode, read_pixels, opened)]


def agree(path, modes=("RGB",)) -> list:
    "For each mode whether the file is read. All ways that read it have the same pixels, or all refuse it."
    was_read = []
    for mode in modes:
        imported, *others = all_ways(path, mode)
        for found in others:
            assert (imported is None) == (found is None), (path.name, mode)
            assert imported is None or np.array_equal(imported, found), (path.name, mode)
        was_read.append(imported is not None)
    return was_read


def every_picture(folder):  # yields the path of each mode in each format that Pillow can write
    Image.init()
    for suffix, form in Image.registered_extensions().items():
        if form not in Image.SAVE: continue
        for mode in MODES:
            path = folder / f"{mode.replace(';', '-')}{suffix}"
            try: picture_in(mode).save(path, form)
            except Exception: continue  # this format doesn't hold this mode
            yield path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return [path for path in every_picture(tmp_path_factory.mktemp("pictures")) if path.is_file()]


pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # of formats that Pillow will drop, and of torn files


def test_prediction_sees_what_import_sees(files):
    "Every mode that Pillow can save, in every format: the same pixels every way, or refused every way."
    was_read = [one for path in files for one in agree(path, ("L", "RGB"))]
    assert sum(was_read) > 300 and was_read.count(False) > 20, (len(was_read), sum(was_read))


def test_torn_and_empty_files(files, tmp_path):
    "A file that ends too soon, which some formats still show in part, and one of no bytes."
    was_read = []
    for path in files:
        content, torn = path.read_bytes(), tmp_path / path.name
        for share in (0.5, 0.9):
            torn.write_bytes(content[:int(share * len(content))])
            was_read += agree(torn)
        torn.write_bytes(b"")
        assert agree(torn) == [False], path.name
    assert was_read.count(False) > 5 * sum(was_read), (len(was_read), sum(was_read))


@pytest.mark.parametrize("limit", [200, 100])
def test_too_many_pixels(files, monkeypatch, limit):
    "Above Pillow's limit, where it only warns, and above twice that, where it raises."
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert not any(one for path in files for one in agree(path))


def test_animations_show_their_first_frame(tmp_path):
    frames, seen = [picture_in("RGB"), picture_in("RGB").rotate(180)], 0
    for suffix, form in Image.registered_extensions().items():
        if form not in Image.SAVE_ALL: continue
        one, several = tmp_path / f"one{suffix}", tmp_path / f"several{suffix}"
        try:
            frames[0].save(one, form)
            frames[0].save(several, form, save_all=True, append_images=frames[1:])
        except Exception: continue  # this format doesn't hold colours
        if agree(several) == [False]: continue
        seen += 1
        difference = all_ways(one)[0].astype(int) - all_ways(several)[0]
        assert np.abs(difference).mean() < 3, suffix  # an animation may be packed otherwise
    assert seen > 5, seen


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_photographs_are_turned_alike(tmp_path, suffix):
    lying, upright = tmp_path / f"lying.{suffix}", set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture_in("RGB").save(lying, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
        assert agree(lying) == [True], orientation
        upright.add(all_ways(lying)[0].tobytes())
    assert len(upright) == 8
