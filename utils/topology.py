"""The network as a graph: its last three blocks, its feature map, its logits, and cuts through it.

Everything works on a flat functional network (no model inside a model) with one input and one output, as
`utils.examined_model.load_examined` returns it. A node is one call of one layer.
"""

import functools
import math

import numpy as np
from keras import Input, Model, Sequential, activations, layers

from utils.config import UserError

SHAPE_ONLY = (layers.Flatten, layers.Reshape, layers.Permute, layers.Dropout, layers.Identity)
USUAL_WIDTH = 64         # channels at the input's resolution: VGG-16's
PADDING = (layers.ZeroPadding2D, layers.Cropping2D)      # move the map against the image


def nodes(network):
    """Every call of a layer in the network, inputs first, as Keras' own nodes in an order that can be replayed."""
    by_depth = network._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]


def enlargement(network):
    """How many times more numbers each pixel of the input becomes in the widest layer than USUAL_WIDTH, at least 1.

    A network that stretches small images first needs far more memory for each than its size tells.
    """
    height, width = network.input_shape[1:3]
    widest = max(math.prod(x.shape[1:]) for node in nodes(network) for x in node.outputs)
    return max(1.0, widest / (USUAL_WIDTH * height * width))


def block_layers(network, block):
    """The layers with weights that a block names, inputs first.

    block: names; each is a layer's exact name or, where there is no such layer, a prefix that ends before an
    underscore. Raises KeyError with the name that fits no layer with weights.
    """
    chosen = []
    for name in block:
        found = [layer for layer in network.layers if layer.name == name and layer.weights] or [
            layer for layer in network.layers if layer.name.startswith(name + "_") and layer.weights]
        if not found:
            raise KeyError(name)
        chosen += found
    return [layer for layer in network.layers if layer in chosen]


def split(network, layers):
    """Two models that share the network's layers: what `layers` do not influence, and the rest.

    Returns (front, head). front: images → the frontier, that is every tensor that no layer in `layers` influences
    and that a later call needs; head: frontier → logits, so head(front(x)) is network(x). With one frontier tensor
    front returns it and head takes it; with several, both use lists in the same order.
    """
    influenced, later, frontier = set(), [], []
    for node in nodes(network):
        if node.is_input:
            continue
        if node.operation in layers or any(id(x) in influenced for x in node.input_tensors):
            later.append(node)
            influenced.update(id(x) for x in node.outputs)
    if not any(id(x) in influenced for x in network.outputs):
        raise ValueError("the cut has nothing behind it: no chosen layer influences the network's output")
    for node in later:
        for x in node.input_tensors:
            if id(x) not in influenced and not any(x is y for y in frontier):
                frontier.append(x)
    inputs = [Input(batch_shape=x.shape, dtype=x.dtype) for x in frontier]
    made = {id(x): y for x, y in zip(frontier, inputs, strict=True)}
    _replay(later, made)
    one = len(frontier) == 1
    front = Model(network.inputs[0], frontier[0] if one else frontier, name="front")
    head = Model(inputs[0] if one else inputs, made[id(network.outputs[0])], name="head")
    return front, head


def flatten(model):
    """The model with the models inside it spelled out, as one flat network that shares the layers.

    Layers that bear the same name in different inner models are renamed to MODEL_NAME, the input to `images`.
    """
    images = Input(batch_shape=model.input_shape, name="images")
    taken = {"images": None}

    def call(operation, *args, prefix="", **kwargs):
        if isinstance(operation, Sequential):
            x = args[0]
            for layer in operation.layers:
                x = call(layer, x, prefix=f"{prefix}{operation.name}_")
            return x
        if isinstance(operation, Model):
            return inner(operation, args[0], f"{prefix}{operation.name}_")
        if isinstance(operation, layers.Identity):
            return args[0]
        if taken.setdefault(operation.name, operation) is not operation:
            operation.name = prefix + operation.name
            while taken.setdefault(operation.name, operation) is not operation:
                operation.name += "_"
        return operation(*args, **{key: value for key, value in kwargs.items() if key not in ("training", "mask")})

    def inner(model, x, prefix):
        made = {id(model.inputs[0]): x}
        _replay(nodes(model), made, functools.partial(call, prefix=prefix))
        return made[id(model.outputs[0])]

    if isinstance(model, Sequential):
        x = images
        for layer in model.layers:
            x = call(layer, x)
    else:
        x = inner(model, images, "")
    return Model(images, x, name=model.name)


def to_logits(network):
    """The network without its final softmax, every layer and weight its own copy.

    A softmax is taken away exactly: a layer of its own is left out, an activation becomes linear. Raises UserError
    where the last layer applies anything else (sigmoid, ReLU, ...), since its output then are no logits.
    """
    last = _last(network)
    activation = _activation(last)
    if activation not in ("linear", "softmax", "log_softmax"):
        raise UserError(f"the last layer {last.name!r} ends in {activation}: only networks that end in a softmax or "
                        "in logits can be examined")
    rank = len(_node_of(network, last).outputs[0].shape)
    if activation != "linear" and getattr(last, "axis", -1) not in (-1, rank - 1):
        raise UserError(f"the softmax {last.name!r} runs over axis {last.axis}, not over the labels: a classifier is "
                        "needed")
    if activation == "linear" and _combines_scores(network, last):
        raise UserError(f"the last layer {last.name!r} combines what a softmax made of logits, as in an ensemble: "
                        "examine its members one by one")
    # A softmax of its own, layer or arithmetic, rather than the activation of a layer.
    drop = activation != "linear" and not getattr(last, "weights", ())
    copies = {}

    def call(operation, *args, **kwargs):
        if operation is last and drop:
            return args[0]
        if id(operation) not in copies:
            if isinstance(operation, layers.Normalization) and operation.weights:
                # As constants: its statistics are no weights to tune, and a copy would have to learn them again.
                copy = layers.Normalization(operation.axis, mean=np.asarray(operation.adapt_mean).tolist(),
                                            variance=np.asarray(operation.adapt_variance).tolist(),
                                            invert=operation.invert, name=operation.name)
            elif isinstance(operation, layers.Layer):
                copy = operation.__class__.from_config(operation.get_config())
                copy.trainable = True
                if operation is last and activation != "linear":
                    copy.activation = activations.linear
            else:
                copy = operation
            copies[id(operation)] = copy
        return copies[id(operation)](*args, **kwargs)

    images = Input(batch_shape=network.input_shape, name="images")
    made = {id(network.inputs[0]): images}
    _replay(nodes(network), made, call)
    result = Model(images, made[id(network.outputs[0])], name=network.name)
    for operation in network.layers:
        copy = copies.get(id(operation))
        if copy is not None and copy.weights:
            for old, new in zip(operation.weights, copy.weights, strict=True):
                new.assign(old)
    return result


def last_features(network):
    """(network from images to what its last layer takes, N×D; that layer's kernel, D×labels), for networks that end in a
    dense layer; None for others.
    """
    last = _last(network)
    before = _node_of(network, last).input_tensors[0]
    if not isinstance(last, layers.Dense) or len(before.shape) != 2:
        return None
    return Model(network.inputs[0], before), last.kernel


def default_blocks(network):
    """The last three stages with weights, as three tuples of layer names, inputs first.

    The network is cut wherever a single tensor carries everything on, so a residual or parallel group is one stage. A
    stage with vectors alone (a normalization) belongs to the one before it. Raises UserError for fewer than three.
    """
    order = nodes(network)
    last_use = {id(x): place for place, node in enumerate(order) for x in node.input_tensors}
    last_use[id(network.outputs[0])] = len(order)
    stages, stage, alive = [], [], set()
    for place, node in enumerate(order):
        # A layer that is called again belongs to the stage of its first call.
        if not node.is_input and _trainable(node.operation) and node.operation not in sum(stages, stage):
            stage = stage + [node.operation]
        alive = {x for x in alive | {id(x) for x in node.outputs} if last_use.get(x, -1) > place}
        if len(alive) == 1 and stage:
            if stages and all(len(weight.shape) < 2 for layer in stage for weight in layer.weights):
                stages[-1] += stage
            else:
                stages.append(stage)
            stage = []
    if len(stages) < 3:
        raise UserError(f"the network has {len(stages)} stages with weights one after another; three are needed: "
                        "name three with BLOCKS, each a layer or several joined by +")
    return tuple(tuple(layer.name for layer in stage) for stage in stages[-3:])


def default_feature_map(network):
    """The name of the last layer whose output still has a place in the image: 4-D, more than 1×1."""
    for node in reversed(nodes(network)):
        if is_feature_map(node.outputs[0]) and not node.is_input and not isinstance(node.operation, PADDING):
            return node.operation.name
    raise UserError("the network has no layer with a spatial output (N×H×W×C): only convolutional networks can be "
                    "examined")


def is_feature_map(x):
    return len(x.shape) == 4 and None not in x.shape[1:] and x.shape[1] * x.shape[2] > 1


def _last(network):
    """The last operation that changes a value."""
    last = network.outputs[0]._keras_history.operation
    while isinstance(last, (*SHAPE_ONLY, layers.Activation)) and _activation(last) == "linear":
        last = _node_of(network, last).input_tensors[0]._keras_history.operation
    return last


def _combines_scores(network, last):
    """Whether layers without weights alone lie between a softmax and the output."""
    waiting, seen = [last], set()
    while waiting:
        operation = waiting.pop()
        if getattr(operation, "weights", ()) or id(operation) in seen:
            continue
        seen.add(id(operation))
        before = [x._keras_history.operation for x in _node_of(network, operation).input_tensors]
        if any(_activation(earlier) in ("softmax", "log_softmax") for earlier in before):
            return True
        waiting += [earlier for earlier in before if not isinstance(earlier, layers.InputLayer)]
    return False


def _trainable(operation):
    return bool(getattr(operation, "trainable_weights", ()))


def _node_of(network, operation):
    return [node for node in nodes(network) if node.operation is operation][-1]


def _activation(operation):
    """The name of what a layer does last: `linear` for a layer without an activation."""
    if isinstance(operation, layers.Softmax):
        return "softmax"
    if isinstance(operation, (layers.ReLU, layers.LeakyReLU, layers.ELU, layers.PReLU, layers.UnitNormalization)):
        return operation.__class__.__name__
    if isinstance(operation, layers.Layer):
        function = getattr(operation, "activation", None)
        if isinstance(function, layers.Softmax) and function.axis == -1:
            return "softmax"
        return getattr(function, "__name__", type(function).__name__) if function is not None else "linear"
    kind = operation.__class__.__name__.lower()         # arithmetic of keras.ops
    return kind if kind in ("softmax", "sigmoid", "tanh", "relu", "relu6", "silu", "gelu", "hardsigmoid", "hardsilu",
                            "softplus", "elu", "leakyrelu", "clip") else "linear"


def _replay(order, made, call=lambda operation, *args, **kwargs: operation(*args, **kwargs)):
    """Call the layers of `order` again, on the tensors in `made` (id of the old tensor → new one), which it fills."""
    for node in order:
        if node.is_input:
            continue
        args, kwargs = node.arguments.fill_in(made)
        outputs = call(node.operation, *args, **kwargs)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        made.update((id(x), y) for x, y in zip(node.outputs, outputs, strict=True))
