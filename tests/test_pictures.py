"Pictures as people have them: import and prediction see the same pixels, or both refuse."
import numpy as np
import pytest
from PIL import Image
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


def both_ways(path, channels):  # pixels or None where it is refused: by import, by prediction
    def tried(act):
        try: return act()
        except (ValueError, OSError): return None
    def open_and_prepare():
        with Image.open(path) as picture: return as_batch([picture], 12, channels)[0]
    mode = {1: "L", 3: "RGB"}[channels]
    imported, asked = tried(lambda: decode(path, 12, mode)), tried(open_and_prepare)
    return imported, None if asked is None else (asked * 255).round().byte().permute(1, 2, 0).numpy()


def every_picture(folder):  # yields the path of each mode in each format that Pillow can write
    Image.init()
    for suffix, form in Image.registered_extensions().items():
        if form not in Image.SAVE: continue
        for mode in MODES:
            path = folder / f"{mode.replace(';', '-')}{suffix}"
            try: picture_in(mode).save(path, form)
            except Exception: continue  # this format doesn't hold this mode
            yield path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of formats that Pillow will drop
def test_prediction_sees_what_import_sees(tmp_path):
    "Every mode that Pillow can save, in every format: the same pixels both ways, or refused both ways."
    seen, refused = 0, 0
    for path in every_picture(tmp_path):
        for channels in (1, 3):
            imported, asked = both_ways(path, channels)
            assert (imported is None) == (asked is None), path.name
            if imported is None: refused += 1
            else:
                assert np.array_equal(imported, asked), path.name
                seen += 1
    assert seen > 150 and refused > 10, (seen, refused)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_photographs_are_turned_alike(tmp_path, suffix):
    lying, upright = tmp_path / f"lying.{suffix}", set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture_in("RGB").save(lying, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
        imported, asked = both_ways(lying, 3)
        assert np.array_equal(imported, asked), orientation
        upright.add(imported.tobytes())
    assert len(upright) == 8
