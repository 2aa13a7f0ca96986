"""A network in bfloat16 is the same network: weights, names and, within rounding, logits."""

import keras
import numpy as np
import pytest

from models import train
from models.architectures import build
from utils.config import UserError
from utils.datasets import dataset
from utils.precision import in_precision


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(0)
    return build(dataset("signs"))


def test_layers_compute_in_bfloat16_and_weights_stay_float32(network):
    copy = in_precision(network, "mixed_bfloat16")
    last = network.layers[-1].name
    assert {layer.compute_dtype for layer in copy.layers if layer.weights and layer.name != last} == {"bfloat16"}
    assert copy.get_layer(last).compute_dtype == "float32"
    assert {weight.dtype for weight in copy.weights} == {"float32"}


def test_weights_names_and_logits_are_kept(network):
    copy = in_precision(network, "mixed_bfloat16")
    assert [weight.path for weight in copy.weights] == [weight.path for weight in network.weights]
    for ours, theirs in zip(copy.get_weights(), network.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    images = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 32, 32, 3)).astype(np.float32)
    logits, rounded = (np.asarray(model(images)) for model in (network, copy))
    assert rounded.dtype == np.float32 and not np.array_equal(rounded, logits)
    np.testing.assert_allclose(rounded, logits, atol=0.05 * np.abs(logits).max())


def test_float32_and_back_gives_the_same_logits(network):
    images = np.random.default_rng(0).uniform(-0.5, 0.5, (4, 32, 32, 3)).astype(np.float32)
    copy = in_precision(in_precision(network, "mixed_bfloat16"), "float32")
    np.testing.assert_array_equal(np.asarray(copy(images)), np.asarray(network(images)))


def test_another_precision_is_refused(network):
    with pytest.raises(UserError, match="PRECISION 'float16' is not known: choose from float32, mixed_bfloat16"):
        in_precision(network, "float16")


def test_a_model_trained_in_bfloat16_is_saved_in_float32(network, tmp_path):
    train.save(tmp_path / "half.keras", tmp_path / "half.json", in_precision(network, "mixed_bfloat16"), {})
    saved = keras.models.load_model(tmp_path / "half.keras", safe_mode=True)
    assert {layer.compute_dtype for layer in saved.layers} == {"float32"}
    np.testing.assert_array_equal(saved.get_weights()[0], network.get_weights()[0])
