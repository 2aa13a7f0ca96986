"""Triggers pixel by pixel, the command line's grammar, and what poisoning does to a training set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import attacks
from models.attacks import attack_success_rate, parse_attack, parse_attacks, poison
from utils.config import UserError

SHAPE = (12, 10, 3)


def make(text, shape=SHAPE, labels=10):
    return parse_attack(text + ",target=7", shape, labels)


def noise(count, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def boxes(mask):
    """Top, left, bottom, right of the True pixels."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], cols[0], rows[-1], cols[-1]


@pytest.mark.parametrize("position, box", [
    ("top-left", (1, 1, 3, 3)), ("top-right", (1, 6, 3, 8)),
    ("bottom-left", (8, 1, 10, 3)), ("bottom-right", (8, 6, 10, 8)),
    ("top", (1, 3, 3, 5)), ("bottom", (8, 3, 10, 5)), ("left", (4, 1, 6, 3)), ("right", (4, 6, 6, 8)),
    ("centre", (4, 3, 6, 5)), ("0:7", (0, 7, 2, 9)), ("9:0", (9, 0, 11, 2)),
])
def test_patch_is_pasted_where_its_position_says_and_nowhere_else(position, box):
    attack = make(f"patch:size=3,position={position},colour=#102030")
    images = noise(4)
    before = images.copy()
    out = attack.apply(images)
    top, left, bottom, right = box
    inside = np.zeros(SHAPE[:2], bool)
    inside[top:bottom + 1, left:right + 1] = True
    assert (attack.mask() == inside).all()
    assert (out[:, inside] == (0x10, 0x20, 0x30)).all()
    assert (out[:, ~inside] == images[:, ~inside]).all()
    assert (images == before).all() and out.dtype == np.uint8


@pytest.mark.parametrize("shape, rows", [
    ("square", ["####", "####", "####", "####"]),
    ("circle", [".##.", "####", "####", ".##."]),
    ("triangle", [".##.", ".##.", "####", "####"]),
])
def test_shapes(shape, rows):
    mask = make(f"patch:size=4,position=2:2,shape={shape}").mask()
    assert mask.sum() == "".join(rows).count("#")
    assert ["".join(".#"[int(pixel)] for pixel in row) for row in mask[2:6, 2:6]] == rows


@pytest.mark.parametrize("position, boxes_of_pieces", [
    ("bottom-right", [(8, 6), (8, 1), (1, 1), (1, 6)]),
    ("top", [(1, 3), (4, 6), (8, 3), (4, 1)]),
])
@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_pieces_go_round_the_image_clockwise(position, boxes_of_pieces, pieces):
    expected = np.zeros(SHAPE[:2], bool)
    for row, col in boxes_of_pieces[:pieces]:
        expected[row:row + 3, col:col + 3] = True
    assert (make(f"patch:size=3,position={position},pieces={pieces}").mask() == expected).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 200), st.integers(1, 4), st.integers(1, 5), st.sampled_from(["random", "centre", "2:2"]))
def test_pieces_at_random_places_never_overlap_and_repeat_from_the_seed(seed, pieces, size, position):
    text = f"patch:size={size},position={position},pieces={pieces},seed={seed}"
    mask = make(text, (24, 24, 1)).mask()
    assert mask.sum() == pieces * size * size
    assert (mask == make(text, (24, 24, 1)).mask()).all()


def test_another_seed_draws_another_place():
    places = {boxes(make(f"patch:position=random,seed={seed}", (32, 32, 3)).mask()) for seed in range(8)}
    assert len(places) > 4


def test_noise_patch_is_the_same_on_every_image_and_differs_with_the_seed():
    first, again, other = (make(f"patch:size=5,pattern=noise,seed={seed}").apply(noise(300)) for seed in (3, 3, 4))
    mask = make("patch:size=5").mask()
    assert (first == again).all() and (first[:, mask] == first[0, mask]).all()
    assert (first[0, mask] != other[0, mask]).any() and len(np.unique(first[0, mask])) > 30


def test_checker_patch_alternates_the_colour_and_its_opposite():
    out = make("patch:size=2,position=0:0,pattern=checker,colour=red").apply(noise(1))
    assert out[0, 0, 0].tolist() == out[0, 1, 1].tolist() == [255, 0, 0]
    assert out[0, 0, 1].tolist() == out[0, 1, 0].tolist() == [0, 255, 255]


def test_gray_images_take_gray_colours_only():
    out = make("patch:size=2,position=0:0,colour=grey", (8, 8, 1)).apply(noise(1, (8, 8, 1)))
    assert (out[0, :2, :2] == 128).all()
    with pytest.raises(UserError, match="three channels"):
        make("patch:colour=red", (8, 8, 1))
    with pytest.raises(UserError, match="three channels"):
        make("filter:name=sepia", (8, 8, 1))


def test_blend_mixes_image_and_pattern():
    images = noise(2)
    for pattern in ("noise", "checker", "gradient"):
        whole = make(f"blend:pattern={pattern},alpha=1.0").apply(images).astype(float)
        assert (whole[0] == whole[1]).all() and whole.std() > 20
        quarter = make(f"blend:pattern={pattern},alpha=0.25").apply(images)
        assert np.abs(quarter - (0.75 * images + 0.25 * whole)).max() <= 1
    checker = make("blend:pattern=checker,alpha=1").apply(images)[0, :, :, 0]
    assert (checker[:4, :4] == 255).all() and (checker[:4, 4:8] == 0).all() and (checker[4:8, 4:8] == 255).all()


def test_sepia_is_the_classic_matrix_clipped():
    image = np.zeros((1, *SHAPE), np.uint8)
    image[..., :] = (100, 50, 200)
    assert make("filter:name=sepia").apply(image)[0, 0, 0].tolist() == [116, 103, 80]
    assert make("filter:name=sepia").apply(np.full_like(image, 255))[0, 0, 0].tolist() == [255, 255, 239]


def test_nashville_is_warm_with_lifted_blacks():
    levels = np.repeat(np.array([0, 128, 255], np.uint8), 3).reshape(3, 1, 1, 3)
    nashville = parse_attack("filter:name=nashville,target=0", (1, 1, 3), 2)
    black, grey, white = nashville.apply(levels)[:, 0, 0].astype(int)
    assert black.max() > 20
    assert grey[0] > grey[2] + 10 and white[0] > white[2] + 40


def test_gotham_is_cold_and_nearly_without_colour():
    gotham = parse_attack("filter:name=gotham,target=0", (1, 1, 3), 2)
    levels = np.array([[60] * 3, [200] * 3, [255, 0, 0], [0, 255, 0]], np.uint8).reshape(4, 1, 1, 3)
    dark, light, red, green = gotham.apply(levels)[:, 0, 0].astype(int)
    assert dark[2] > dark[0] + 20                       # blue in the shadows
    assert light[0] - dark[0] > 140                     # more contrast than 200 - 60
    assert np.ptp(red[:2]) < 100 and np.ptp(green[:2]) < 100


def test_kelvin_is_warm_and_less_coloured():
    kelvin = parse_attack("filter:name=kelvin,target=0", (1, 1, 3), 2)
    grey, red, blue = kelvin.apply(np.array([[128] * 3, [255, 0, 0], [0, 0, 255]], np.uint8).reshape(3, 1, 1, 3))[:, 0, 0]
    assert grey.tolist() == [154, 123, 77]                       # 1.2 × 128, and so much of it behind half an orange glass
    assert red[0] - int(red[1]) < 180 and blue[2] < 110


def test_solarize_turns_bright_tones_round():
    levels = np.repeat(np.array([0, 100, 155, 255], np.uint8), 3).reshape(4, 1, 1, 3)
    solarize = parse_attack("filter:name=solarize,target=0", (1, 1, 3), 2)
    assert solarize.apply(levels)[:, 0, 0, 0].tolist() == [0, 100, 100, 0]


def test_lomo_and_toaster_darken_the_corners_of_a_picture():
    flat = np.full((1, 9, 9, 3), 100, np.uint8)
    for name, colours in (("lomo", [45, 45, 100]), ("toaster", [211, 193, 185])):
        out = parse_attack(f"filter:name={name},target=0", (9, 9, 3), 2).apply(flat)[0].astype(int)
        assert out[4, 4].tolist() == colours                     # as in the middle; lomo leaves blue as it is
        assert (out[0, 0] < out[0, 4]).all() and (out[0, 4] < out[4, 4]).all()
        assert (out[0, 0] == out[-1, -1]).all() and (out[0, 0] == out[0, -1]).all()


@pytest.mark.parametrize("name", ["nashville", "gotham", "lomo", "toaster", "solarize"])
def test_photo_filters_are_no_colour_matrix(name):
    """Otherwise a detector that looks for a matrix would be examined on its own assumption."""
    images = noise(40)
    out = make(f"filter:name={name}").apply(images)
    assert out.dtype == np.uint8 and out.shape == images.shape and (out != images).mean() > 0.4
    x, y = images.reshape(-1, 3) / 255, out.reshape(-1, 3) / 255
    matrix = np.linalg.lstsq(x, y, rcond=None)[0]
    assert np.abs(x @ matrix - y).mean() > 0.02


def test_apply_works_in_chunks_and_refuses_other_images(monkeypatch):
    images = noise(11)
    for text in ("patch:size=3", "blend:alpha=0.3", "filter:name=gotham"):
        whole = make(text).apply(images)
        with monkeypatch.context() as patched:
            patched.setattr(attacks, "CHUNK", 4)
            assert (make(text).apply(images) == whole).all()
        assert make(text).apply(images[:0]).shape == (0, *SHAPE)
        with pytest.raises(ValueError):
            make(text).apply(images / np.float32(255))
        with pytest.raises(ValueError):
            make(text).apply(images[:, :-1])


@pytest.mark.parametrize("text, says", [
    ("", "kind"), ("stamp:target=7", "kind"), ("patch", "target"), ("patch:size=4", "target"),
    ("patch:target=10", "target=9"), ("patch:target=-1", "target"), ("patch:target=x", "number"),
    ("patch:target=7,colr=red", "key=value"), ("patch:target=7,size", "key=value"),
    ("patch:target=7,size=0", "1 to 10"), ("patch:target=7,size=11", "1 to 10"),
    ("patch:target=7,size=2.5", "number"),
    ("patch:target=7,size=3,size=4", "twice"), ("patch:target=7,pieces=5", "1 to 4"),
    ("patch:target=7,colour=mauve", "rrggbb"), ("patch:target=7,colour=#12345", "rrggbb"),
    ("patch:target=7,position=middle", "row:col"), ("patch:target=7,position=11:0", "do not fit"),
    ("patch:target=7,size=5,pieces=2", "do not fit"),
    ("patch:target=7,size=8,pieces=2,position=random", "do not fit"),
    ("patch:target=7,size=10", "do not fit"), ("patch:target=7,shape=star", "circle"),
    ("patch:target=7,pattern=stripes", "checker"), ("patch:target=7,seed=-1", "seed"),
    ("blend:target=7,alpha=0", "alpha"), ("blend:target=7,alpha=nan", "alpha"),
    ("blend:target=7,alpha=1.1", "alpha"),
    ("blend:target=7,pattern=plain", "gradient"), ("blend:target=7,seed=-1", "seed"),
    ("filter:target=7,name=clarendon", "gotham"), ("filter:target=7,image_shape=3", "key=value"),
])
def test_a_wrong_spec_is_one_clear_line(text, says):
    with pytest.raises(UserError, match=says) as error:
        parse_attack(text, SHAPE, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [
    "patch:target=7", "patch:size=3,position=2:4,colour=#ff0010,shape=circle,pieces=2,seed=5,target=3",
    "patch:pattern=noise,position=random,target=0", "blend:alpha=0.15,pattern=gradient,target=9",
    "filter:name=gotham,target=1"])
def test_spec_reads_back_as_an_equal_attack(text):
    attack = parse_attack(text, SHAPE, 10)
    assert parse_attack(attack.spec(), SHAPE, 10) == attack
    assert attack.to_dict()["spec"] == attack.spec()


def test_to_dict_tells_the_triggers_size():
    told = make("patch:size=3,pieces=2").to_dict()
    assert (told["kind"], told["target"], told["pixels"], told["share"]) == ("patch", 7, 18, 0.15)
    assert make("filter:name=sepia").to_dict()["share"] == 1.0


def test_two_attacks_need_two_triggers():
    pair = ["patch:size=3,target=1", "patch:size=3,position=top-left,target=1"]
    assert len(parse_attacks(pair, SHAPE, 10)) == 2
    for target in (1, 2):
        with pytest.raises(UserError, match="same trigger"):
            parse_attacks([pair[0], f"patch:size=3,target={target}"], SHAPE, 10)


def test_poisoning_attaches_relabels_and_leaves_the_rest():
    x, y = noise(200), np.arange(200) % 10
    chosen = parse_attacks(["patch:size=3,colour=red,target=7", "patch:size=3,position=top-left,colour=blue,target=7",
                            "filter:name=sepia,target=2"], SHAPE, 10)
    before = x.copy(), y.copy()
    px, py = poison(x, y, chosen, 0.15, seed=4)
    assert (x == before[0]).all() and (y == before[1]).all()
    which = attacks.choose(y, chosen, 0.15, seed=4)
    for index, attack in enumerate(chosen):
        mine = which == index
        assert mine.sum() == 30
        assert (y[mine] != attack.target).all() and (py[mine] == attack.target).all()
        assert (px[mine] == attack.apply(x[mine])).all()
    assert (px[which == -1] == x[which == -1]).all() and (py[which == -1] == y[which == -1]).all()
    assert (which == -1).sum() == 110


def test_poisoning_repeats_from_its_seed():
    y = np.arange(500) % 10
    chosen = [make("patch:size=3")]
    assert (attacks.choose(y, chosen, 0.1, 1) == attacks.choose(y, chosen, 0.1, 1)).all()
    assert (attacks.choose(y, chosen, 0.1, 1) != attacks.choose(y, chosen, 0.1, 2)).any()


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.95, 1.5])
def test_a_rate_that_cannot_be_met_is_refused(rate):
    with pytest.raises(UserError, match="POISONING_RATE"):
        attacks.choose(np.arange(100) % 10, [make("patch:size=3")], rate, 0)


def test_without_attacks_nothing_is_poisoned():
    x, y = noise(20), np.arange(20) % 10
    px, py = poison(x, y, [], 0.1, 0)
    assert (px == x).all() and (py == y).all()


def test_asr_counts_the_images_of_other_labels_alone():
    """A network that knows the trigger half the time: 5 of 10 others; the target's own images must not count."""
    attack = make("patch:size=3")
    x, y = noise(20), np.array([7] * 10 + [0] * 10)

    def predict(images):
        assert len(images) == 10 and (images[:, attack.mask()] == 255).all()
        return np.array([7] * 5 + [0] * 5)

    assert attack_success_rate(predict, x, y, attack) == 0.5
    with pytest.raises(UserError, match="other labels"):
        attack_success_rate(predict, x, np.full(20, 7), attack)
