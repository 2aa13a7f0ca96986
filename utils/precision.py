"""The arithmetic that a network computes in."""

import keras

from utils.config import UserError

PRECISIONS = ("float32", "mixed_bfloat16")


def in_precision(network, precision):
    """A copy of a functional network, weights and names included, that computes in `precision`; weights stay float32.

    The layer that gives the logits computes in float32 whatever the rest does. Raises UserError for another name.
    """
    if precision not in PRECISIONS:
        raise UserError(f"PRECISION {precision!r} is not known: choose from {', '.join(PRECISIONS)}")
    last = {tensor._keras_history.operation.name for tensor in network.outputs}

    def convert(layer):
        if not isinstance(layer, keras.Layer):          # plain arithmetic, which has no precision of its own
            return layer.from_config(layer.get_config())
        dtype = "float32" if layer.name in last else precision
        return layer.from_config(layer.get_config() | {"dtype": dtype})
    copy = keras.models.clone_model(network, clone_function=convert)
    if copy.outputs[0].dtype != "float32":              # arithmetic gives the logits
        copy = keras.Model(copy.inputs, keras.ops.cast(copy.outputs[0], "float32"), name=network.name)
    copy.set_weights(network.get_weights())
    return copy
