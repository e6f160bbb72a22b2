"""Images are preprocessed as the models were trained, and a file that is not a tagger is refused."""

import math
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from captioning.captions import CHARACTER, GENERAL, RATING
from captioning.tag_selection import read_tags
from captioning.wd14 import Tagger, preprocess
from common.errors import ModelError
from common.images import open_rgb
from demo import tiny_tagger
from demo.tiny_tagger import Shape


def tagger_of(folder, batch_size=4) -> Tagger:
    return Tagger(folder / "model.onnx", folder / "selected_tags.csv", batch_size)


def bicubic_reference(pixels: np.ndarray, side: int) -> np.ndarray:
    """Float [n, n, 3] -> [side, side, 3]: Keys' cubic with a = -0.5, widened when shrinking; along rows, then columns,
    to whole levels after each."""

    def kernel(x):
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    size = len(pixels)
    scale, width = size / side, max(size / side, 1.0)
    matrix = np.zeros((side, size))
    for out in range(side):
        centre = (out + 0.5) * scale
        for at in range(max(0, math.floor(centre - 2 * width)), min(size, math.ceil(centre + 2 * width))):
            matrix[out, at] = kernel((at + 0.5 - centre) / width)
    matrix /= matrix.sum(axis=1, keepdims=True)
    across = np.rint(np.clip(matrix @ pixels, 0, 255))
    down = np.rint(np.clip(matrix @ across.swapaxes(0, 1), 0, 255))
    return down.swapaxes(0, 1)


@pytest.mark.parametrize(("name", "side"), [("coffee", 448), ("astronaut", 100), ("chelsea", 100)])
def test_preprocessing_equals_a_plain_reference(photographs, name, side):
    image = photographs[name]
    pixels = np.asarray(image, np.float64)
    height, width = pixels.shape[:2]
    edge = max(height, width)
    square = np.full((edge, edge, 3), 255.0)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = pixels
    expected = bicubic_reference(square, side)[..., [2, 1, 0]]
    images = preprocess(image, side)
    assert (images.dtype, images.shape) == (np.float32, (side, side, 3))
    # Halves, which Pillow's fixed-point sums round the other way: by one level in each of the two passes.
    assert (np.abs(images - expected) <= 2).all()
    assert (images == expected).mean() > 0.99


def test_preprocessing_is_blue_first_in_0_to_255_on_a_centred_white_square():
    images = preprocess(Image.new("RGB", (448, 224), (255, 128, 0)), 448)
    assert (images[112:336] == [0, 128, 255]).all()
    assert (images[:112] == 255).all()
    assert (images[336:] == 255).all()


def test_preprocessing_is_bit_equal_to_the_convention_of_the_models(tmp_path, photographs):
    """A turned image with transparency, step by step in Pillow as the models' authors describe it."""
    turned = photographs["chelsea"].convert("RGBA")
    turned.putalpha(Image.linear_gradient("L").resize(turned.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    upright = turned.transpose(Image.Transpose.ROTATE_270)
    opaque = Image.alpha_composite(Image.new("RGBA", upright.size, (255, 255, 255, 255)), upright).convert("RGB")
    side = max(opaque.size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(opaque, ((side - opaque.width) // 2, (side - opaque.height) // 2))
    expected = np.asarray(square.resize((448, 448), Image.Resampling.BICUBIC), np.float32)[:, :, ::-1]
    assert (preprocess(open_rgb(tmp_path / "a.png"), 448) == expected).all()


def test_tags_are_the_same_in_every_orientation_and_encoding(tmp_path, photographs, tiny):
    tagger, image = tagger_of(tiny), photographs["coffee"].resize((300, 200))
    expected = tagger.probabilities([preprocess(image, 448)])[0]
    turned = {  # EXIF orientation -> how the file holds the image
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, transpose in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.transpose(transpose).save(tmp_path / "turned.png", exif=exif)
        assert (tagger.probabilities([preprocess(open_rgb(tmp_path / "turned.png"), 448)])[0] == expected).all()
    image.save(tmp_path / "a.webp", lossless=True)
    image.save(tmp_path / "a.bmp")
    for name in ("a.webp", "a.bmp"):
        assert (tagger.probabilities([preprocess(open_rgb(tmp_path / name), 448)])[0] == expected).all()


def test_unusual_images_are_seen_as_they_look(tmp_path, photographs):
    image = photographs["chelsea"]
    grey = np.asarray(image.convert("L"))
    transparent = image.convert("RGBA")
    transparent.putalpha(Image.new("L", image.size, 0))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16bit.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    image.quantize(256).save(tmp_path / "palette.png")
    transparent.save(tmp_path / "alpha.png")
    white, greys = np.full((448, 448, 3), 255.0), preprocess(Image.fromarray(grey).convert("RGB"), 448)
    for name, expected, tolerance in [
        ("16bit.png", greys, 1),
        ("cmyk.jpg", preprocess(image, 448), 3),
        ("palette.png", preprocess(image, 448), 8),
        ("alpha.png", white, 0),
    ]:
        assert np.abs(preprocess(open_rgb(tmp_path / name), 448) - expected).mean() <= tolerance, name


def test_different_images_get_different_tags(photographs, tiny):
    tagger = tagger_of(tiny)
    result = tagger.probabilities([preprocess(image, tagger.side_px) for image in photographs.values()])
    assert result.shape == (len(photographs), len(tagger.tags))
    assert len({tuple(row > 0.35) for row in result}) == len(photographs)
    assert all(5 <= (row > 0.35).sum() <= 21 for row in result)


def test_tiny_tagger_has_a_real_ones_mix_and_the_same_seed_gives_the_same_bytes(tmp_path, tiny):
    tags = read_tags(tiny / "selected_tags.csv")
    assert Counter(tag.category for tag in tags) == {GENERAL: 52, CHARACTER: 5, RATING: 4}
    assert len({tag.name for tag in tags}) == len(tags)
    again, other = tiny_tagger.build(tmp_path / "again"), tiny_tagger.build(tmp_path / "other", seed=1)
    assert (again / "model.onnx").read_bytes() == (tiny / "model.onnx").read_bytes() != (other / "model.onnx").read_bytes()


def test_tags_of_an_image_do_not_depend_on_what_else_is_tagged(photographs, tiny):
    tagger = tagger_of(tiny, batch_size=3)
    images = [preprocess(image, 448) for image in photographs.values()]
    together = tagger.probabilities(images)
    alone = [tagger.probabilities([one])[0] for one in images]
    assert (together == alone).all()


@pytest.mark.parametrize("shape", [Shape(batch=1), Shape(batch=3), Shape(channels_first=True), Shape(batch=1, channels_first=True)])
def test_layout_and_batch_are_read_from_the_model(tmp_path, photographs, tiny, shape):
    images = [preprocess(image, 448) for image in photographs.values()]
    expected = tagger_of(tiny).probabilities(images)
    result = tagger_of(tiny_tagger.build(tmp_path, shape=shape)).probabilities(images)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_side_is_read_from_the_model(tmp_path, photographs):
    tagger = tagger_of(tiny_tagger.build(tmp_path, shape=Shape(side_px=224)))
    assert tagger.side_px == 224
    assert tagger.probabilities([preprocess(photographs["coffee"], 224)]).shape == (1, len(tagger.tags))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_model_that_is_cut_off_is_refused(tmp_path, share):
    folder = tiny_tagger.build(tmp_path)
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"cut off or not an ONNX model.*delete it and run again"):
        tagger_of(folder)


def test_model_that_is_something_else_is_refused(tmp_path):
    folder = tiny_tagger.build(tmp_path)
    (folder / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="not an ONNX model"):
        tagger_of(folder)
    inputs = [onnx.helper.make_tensor_value_info("tokens", onnx.TensorProto.INT64, [1, 77])]
    outputs = [onnx.helper.make_tensor_value_info("same", onnx.TensorProto.INT64, [1, 77])]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["tokens"], ["same"])], "text", inputs, outputs)
    onnx.save(onnx.helper.make_model(graph, ir_version=8), folder / "model.onnx")
    with pytest.raises(ModelError, match="not float images"):
        tagger_of(folder)


def test_tags_that_do_not_fit_the_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"lists 61 tags, but model.onnx gives 63 values"):
        tagger_of(tiny_tagger.build(tmp_path, shape=Shape(extra_outputs=2)))


def test_tags_that_do_not_fit_a_width_the_model_leaves_open_are_refused(tmp_path, photographs):
    folder = tiny_tagger.build(tmp_path, shape=Shape(extra_outputs=2))
    model = onnx.load(folder / "model.onnx")
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "tags"
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(ModelError, match="take both files from the same repository"):
        tagger_of(folder).probabilities([preprocess(photographs["coffee"], 448)])


def test_values_that_are_not_probabilities_are_refused(tmp_path, photographs):
    folder = tiny_tagger.build(tmp_path, shape=Shape(logits=True))
    with pytest.raises(ModelError, match="not probabilities"):
        tagger_of(folder).probabilities([preprocess(photographs["coffee"], 448)])
    model = onnx.load(tiny_tagger.build(tmp_path) / "model.onnx")
    bias = next(constant for constant in model.graph.initializer if constant.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(bias), np.nan), "bias"))
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(ModelError, match="not probabilities"):
        tagger_of(folder).probabilities([preprocess(photographs["coffee"], 448)])


@pytest.mark.parametrize(
    "text", ["", "tag_id,name,category,count\n", "a,b\n1,2\n", "name,category\nsmile,many\n", "<html>\n", "name,category\na\0b,0\n"]
)
def test_file_that_is_not_a_list_of_tags_is_refused(tmp_path, text):
    (tmp_path / "selected_tags.csv").write_text(text)
    with pytest.raises(ModelError, match=r"selected_tags.csv: .*delete it and run again"):
        read_tags(tmp_path / "selected_tags.csv")


def test_tags_file_of_bytes_is_refused(tmp_path):
    (tmp_path / "selected_tags.csv").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ModelError, match="is not a table"):
        read_tags(tmp_path / "selected_tags.csv")
