"""A network built from a stranger's description: plain JSON in, layers of a fixed list out.

Keras' own deserializer imports what a description names, and its safe mode has been passed by again and again. It is
not used here: a description is only data. Its layers are looked up in `LAYERS`, their options are checked and handed
to the constructors, and the graph is wired up again; whatever is not on a list is refused by name. Descriptions may
come from Keras 2.2 to 2.15 (`.h5`, JSON) and from Keras 3.
"""

import inspect
import json
import math
import re

import keras
from keras import layers, ops
from keras.src.backend.common import global_state

from utils.config import UserError

LAYERS = {name: getattr(layers, name) for name in """
    Conv1D Conv2D Conv2DTranspose DepthwiseConv2D SeparableConv2D Dense MultiHeadAttention
    BatchNormalization LayerNormalization GroupNormalization UnitNormalization RMSNormalization
    Normalization Rescaling
    MaxPooling2D AveragePooling2D GlobalMaxPooling2D GlobalAveragePooling2D GlobalMaxPooling1D GlobalAveragePooling1D
    AdaptiveAveragePooling2D AdaptiveMaxPooling2D
    Activation ReLU LeakyReLU ELU PReLU Softmax
    Dropout SpatialDropout1D SpatialDropout2D GaussianDropout GaussianNoise AlphaDropout
    Flatten Reshape Permute RepeatVector ZeroPadding2D Cropping2D UpSampling2D Resizing CenterCrop Identity
    Add Subtract Multiply Average Maximum Minimum Concatenate Dot
    """.split() if hasattr(layers, name)}
# These pass images on unchanged outside training; a scan sees the network as it is used, so they are left out.
AUGMENTATIONS = set("""
    RandomFlip RandomRotation RandomTranslation RandomZoom RandomContrast RandomBrightness RandomShear RandomHeight
    RandomWidth RandomHue RandomSaturation RandomSharpness RandomColorJitter RandomColorDegeneration RandomGrayscale
    RandomErasing RandomGaussianBlur RandomPosterization RandomPerspective RandomInvert RandomElasticTransform
    RandAugment AugMix MixUp CutMix ActivityRegularization""".split())
# Arithmetic between tensors: class name in a Keras 3 description → function of keras.ops.
OPS = {name: getattr(ops, function) for name, function in {
    "Add": "add", "Subtract": "subtract", "Multiply": "multiply", "Divide": "divide", "TrueDivide": "true_divide",
    "Negative": "negative", "Square": "square", "Sqrt": "sqrt", "Absolute": "absolute", "Abs": "abs", "Mean": "mean",
    "Max": "max", "Min": "min", "Sum": "sum", "Minimum": "minimum", "Maximum": "maximum", "Clip": "clip",
    "Reshape": "reshape", "Transpose": "transpose", "Concatenate": "concatenate", "Squeeze": "squeeze",
    "ExpandDims": "expand_dims", "Relu": "relu", "Relu6": "relu6", "Softmax": "softmax", "Sigmoid": "sigmoid",
    "Silu": "silu", "Tanh": "tanh", "Gelu": "gelu", "HardSigmoid": "hard_sigmoid", "HardSilu": "hard_silu",
    "Softplus": "softplus", "Elu": "elu", "LeakyRelu": "leaky_relu"}.items()} | {"GetItem": lambda x, key: x[key]}
# The same in Keras 2: function of TensorFlow → function of keras.ops.
TENSORFLOW_OPS = {
    "__operators__.add": ops.add, "math.add": ops.add, "math.subtract": ops.subtract, "math.multiply": ops.multiply,
    "math.truediv": ops.divide, "math.divide": ops.divide, "math.maximum": ops.maximum, "math.minimum": ops.minimum,
    "nn.relu": ops.relu, "nn.relu6": ops.relu6, "nn.softmax": ops.softmax, "nn.silu": ops.silu,
    "math.sigmoid": ops.sigmoid, "nn.swish": ops.silu}
MODELS = {"Functional", "Model", "Sequential"}
ACTIVATIONS = set("""linear relu relu6 leaky_relu elu selu gelu silu swish softmax log_softmax sigmoid hard_sigmoid
    tanh hard_tanh hard_silu hard_swish softplus softsign mish exponential celu""".split())
# Named parts of a description that say how a network was trained. They are checked and then left out: every weight
# comes from the file.
TRAINING = {
    "initializer": set("""Zeros Ones Constant RandomNormal RandomUniform TruncatedNormal VarianceScaling GlorotNormal
        GlorotUniform HeNormal HeUniform LecunNormal LecunUniform Orthogonal OrthogonalInitializer Identity
        IdentityInitializer Normal Uniform Zero One""".split()),
    "regularizer": set("L1 L2 L1L2 OrthogonalRegularizer".split()),
    "constraint": set("MaxNorm MinMaxNorm NonNeg UnitNorm".split())}
MODULES = re.compile(r"(builtins|keras|tf_keras|tensorflow\.(python\.)?keras|tensorflow_core\.[\w.]*keras)(\.\w+)*\Z")
# Options of other Keras versions that say nothing about what a network computes.
OTHER_VERSIONS = set("""batch_input_shape batch_shape fused adjustment virtual_batch_size renorm renorm_clipping
    renorm_momentum synchronized lora_rank lora_alpha quantization_config input_dtype autocast flash_attention
    implementation force_generator rng_type value_range input_dim activity_regularizer""".split())

LAYER_COUNT = 3000           # calls of layers in the network once no model is inside another
ROUNDS = 50                  # over the calls of one model: Keras lists layers so that few have to wait for others
NESTING = 12                 # models inside models
SIDE = 4096                  # pixels
TENSOR = 1 << 26             # numbers that one image may become inside the network: VGG-16 needs 2^22
WHOLE = 2 ** 31              # any number in a description


def build(config, shape, available, where, version=None):
    """The network that a description describes, its weights zero.

    config: the description as `utils.safe_files.parse_json` returns it, with `class_name` and `config`. shape: H, W,
    C for a description that leaves them open. available: how many numbers the file with the weights holds; a network
    with more is refused before any memory is used for it. version: of Keras, where the file says it; a description may say
    its own. Models stay inside models, as the weights file has them. Raises UserError.
    """
    try:
        if _calls(config, where, 0) > LAYER_COUNT:
            raise UserError(f"{where} describes more than {LAYER_COUNT} layers: refused")
        if str(version or config.get("keras_version")).startswith(("1.", "2.")) and '"hard_sigmoid"' in json.dumps(config):
            _refuse(where, "hard_sigmoid of Keras 2, by that name another function in Keras 3,")
        with deferred_weights(where, available):
            return _top(config, shape, where)
    except UserError:
        raise
    except Exception as error:      # the constructors check their options each in their own way
        raise UserError(f"{where} describes a network that cannot be built ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:200]}): save the model again") from None


class deferred_weights:
    """Inside, Keras notes weights without using memory; they come into being at the end if there are not too many."""

    def __init__(self, where, available):
        self.where, self.available = where, available
        self.scope = keras.StatelessScope(initialize_variables=False)

    def __enter__(self):
        global_state.set_global_attribute("uninitialized_variables", [])
        self.scope.__enter__()

    def __exit__(self, kind, *rest):
        self.scope.__exit__(kind, *rest)
        noted = global_state.get_global_attribute("uninitialized_variables")
        needed = sum(math.prod(variable.shape) for variable in noted if "seed_generator" not in variable.path)
        if kind is not None or needed > self.available:
            global_state.set_global_attribute("uninitialized_variables", [])
        if kind is None and needed > self.available:
            raise UserError(f"{self.where} describes a network of {needed} weights, but the file holds "
                            f"{self.available}: truncated, hostile or of another network")
        with keras.StatelessScope():
            pass            # leaving an outermost scope is what makes Keras initialize the weights it noted


def _refuse(where, what):
    raise UserError(f"{where}: {what} is not among the standard layers that can be loaded without running code from "
                    "the file: rebuild the model from standard layers and save it again")


def _checked_class(item, where):
    """The class name of {"class_name": ..., ...}; refuses anything registered by a package or outside Keras."""
    if not isinstance(item, dict) or not isinstance(item.get("class_name"), str):
        _refuse(where, f"{str(item)[:80]!r}")
    name, module, registered = item["class_name"], item.get("module"), item.get("registered_name")
    if module is not None and not (isinstance(module, str) and MODULES.match(module)):
        _refuse(where, f"{name[:80]!r} of module {str(module)[:80]!r}")
    if registered is not None and registered != name:
        _refuse(where, f"{name[:80]!r} registered as {str(registered)[:80]!r}")
    return name


def _config(item, where):
    config = item.get("config")
    if not isinstance(config, dict):
        _refuse(where, f"a {item.get('class_name')} without options")
    return config


def _model_parts(item, where):
    """(name, list of layer descriptions, options) of a model's description."""
    config = item.get("config")
    if isinstance(config, list):                # Keras before 2.2.3 wrote a Sequential as a plain list
        config = {"name": "sequential", "layers": config}
    if not isinstance(config, dict) or not isinstance(config.get("layers"), list) or not config["layers"]:
        _refuse(where, f"a {item.get('class_name')} without layers")
    name = _name(config, where)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):       # TensorFlow takes no others; it names nothing else
        name = "model_" + re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return name, config["layers"], config


def _name(config, where):
    name = config.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 200 or "/" in name or not name.isprintable():
        _refuse(where, f"a layer named {str(name)[:80]!r}")
    return name


def _calls(item, where, depth):
    """How many layer calls a model makes with the models inside it spelled out: the work, known before it is done."""
    if depth > NESTING:
        raise UserError(f"{where} nests models more than {NESTING} deep: refused")
    if _checked_class(item, where) not in MODELS:
        _refuse(where, f"a model of class {item['class_name'][:80]!r}")
    total = 0
    for layer in _model_parts(item, where)[1]:
        times = max(1, len(layer["inbound_nodes"])) if isinstance(layer, dict) and isinstance(
            layer.get("inbound_nodes"), list) else 1
        total += times * (_calls(layer, where, depth + 1) if _checked_class(layer, where) in MODELS else 1)
    return total


def _top(item, shape, where):
    name, described, config = _model_parts(item, where)
    if item["class_name"] != "Sequential":
        return _functional(item, where, shape)
    first = described[0]
    while _checked_class(first, where) in MODELS:           # a model inside may be what gives the shape
        first = _model_parts(first, where)[1][0]
    built = item.get("build_config")
    given = (_shape(first) or _sides(config.get("build_input_shape"))
             or _sides(built.get("input_shape") if isinstance(built, dict) else None) or (None, *shape))
    images = keras.Input(batch_shape=_image_shape(given, shape, where), name="images")
    return keras.Sequential([images, *_stack(described, where)], name=name)


def _stack(described, where):
    return [_layer(item, where) for item in described if _checked_class(item, where) != "InputLayer"]


def _shape(item):
    """The input shape in a layer's description, batch first, or None."""
    config = item.get("config") if isinstance(item, dict) else None
    if not isinstance(config, dict):
        return None
    shape = _sides(config.get("batch_shape") or config.get("batch_input_shape"))
    if shape is None and config.get("shape"):
        shape = (None, *_sides(config["shape"]))
    return shape


def _sides(value):
    shape = _plain(value)
    return tuple(shape) if isinstance(shape, (list, tuple)) else None


def _image_shape(given, shape, where):
    """N×H×W×C of the network's input, open sides taken from `shape`."""
    if len(given) != 4:
        raise UserError(f"{where} takes inputs of shape {str(given[1:])[:60]}: an image classifier takes height, "
                        "width, channels")
    height, width, channels = (have or want for have, want in zip(given[1:], shape, strict=True))
    if None in (height, width):
        raise UserError(f"{where} takes images of any size: choose the DATASET of the size that it was trained with, "
                        "or give ARCHITECTURE, the model's JSON with the size filled in")
    if channels not in (1, 3):
        raise UserError(f"{where} takes {str(channels)[:20]} channels: only networks for 1 (grey) or 3 (RGB) "
                        "channels, channels last, can be examined")
    if not all(isinstance(side, int) and 0 < side <= SIDE for side in (height, width)):
        raise UserError(f"{where} takes images of {str((height, width))[:60]}: sides from 1 to {SIDE} can be "
                        "examined")
    return None, height, width, channels


def _functional(item, where, shape=None):
    """A functional model; `shape` for the outermost one, whose input has to be an image."""
    name, described, config = _model_parts(item, where)
    legacy = all(isinstance(node, list) for layer in described for node in layer.get("inbound_nodes") or [])
    made, outputs, waiting, kinds = {}, {}, [], {}
    for layer in described:
        kind, label = _checked_class(layer, where), layer.get("name") or _name(_config(layer, where), where)
        if not isinstance(label, str) or label in made:
            raise UserError(f"{where}: two layers are called {str(label)[:80]!r}: refused")
        kinds[label] = kind
        if kind == "InputLayer":
            given = _shape(layer)
            if given is None:
                _refuse(where, f"input {label!r} without a shape")
            made[label] = keras.Input(batch_shape=_image_shape(given, shape, where) if shape else (
                None, *given[1:]), name=_name({"name": label}, where))
            outputs[label] = [made[label]]
        else:
            made[label] = _layer(layer, where)
            outputs[label] = []
            waiting += [(label, node) for node in layer.get("inbound_nodes") or []]

    references = 0

    def tensor(label, number, index):
        """The tensor that a description calls [layer, number of its call, number of the output]."""
        nonlocal references
        references += 1
        if references > ROUNDS * LAYER_COUNT:
            raise UserError(f"{where}: the graph has more than {ROUNDS * LAYER_COUNT} connections: refused")
        if label not in made:
            raise UserError(f"{where}: the graph names a layer {str(label)[:80]!r} that is not there: save it again")
        if not isinstance(number, int) or not 0 <= number <= LAYER_COUNT or index != 0:
            _refuse(where, f"output {str(index)[:20]} of {label!r}")
        have = outputs[label]
        if number >= len(have):
            raise _NotYet
        return have[number]

    def inner(reference):
        # A model inside a model counts its own building as call 0 in Keras 2; Keras 3 keeps that for inner functional
        # models in the list of outputs alone.
        label, number, index = reference
        return [label, number - 1 if legacy and kinds.get(label) in MODELS else number, index]

    for _ in range(ROUNDS):
        later = []
        for label, node in waiting:
            try:
                args, kwargs = (_legacy_call if isinstance(node, list) else _call)(
                    node, lambda reference: tensor(*inner(reference)), where)
            except _NotYet:
                later.append((label, node))
                continue
            outputs[label].append(made[label](*args, **kwargs))
        waiting = later
    if waiting:
        raise UserError(f"{where}: the graph has a loop or misses the input of {waiting[0][0]!r}: save it again")
    ends = [config.get("input_layers"), config.get("output_layers")]
    if any(not isinstance(end, list) or not end for end in ends):
        _refuse(where, f"model {name!r} without one input and one output")
    ends = [end[0] if isinstance(end[0], list) and len(end) == 1 else end for end in ends]
    if any(isinstance(part, list) for end in ends for part in end) or any(len(end) != 3 for end in ends):
        raise UserError(f"{where}: model {name!r} has several inputs or outputs; one image in and one row of scores "
                        "out can be examined: save the part that classifies")
    label, number, index = ends[1]
    if kinds.get(label) in {"Functional", "Model"} or legacy and kinds.get(label) == "Sequential":
        number -= 1
    try:
        return keras.Model(tensor(*ends[0]), tensor(label, max(number, 0), index), name=name)
    except _NotYet:
        raise UserError(f"{where}: the graph of model {name!r} does not reach its output: save it again") from None


class _NotYet(Exception):
    """A call needs a tensor that another call has still to make."""


def _call(node, tensor, where):
    """(args, kwargs) of a call as Keras 3 describes it."""
    if not isinstance(node, dict) or not isinstance(node.get("args"), (list, dict)):
        _refuse(where, f"the call {str(node)[:80]!r}")
    args, kwargs = _plain(node["args"], tensor), _plain(node.get("kwargs") or {}, tensor)
    return args, {key: value for key, value in kwargs.items()
                  if key not in ("training", "mask") and value is not None}


def _legacy_call(node, tensor, where):
    """(args, kwargs) of a call as Keras 2 describes it: [[layer, call, output, kwargs], ...], or one such entry."""
    entries = node if node and isinstance(node[0], list) else [node]
    found, kwargs = [], {}
    for entry in entries:
        if not 3 <= len(entry) <= 4:
            _refuse(where, f"the call {str(node)[:80]!r}")
        found.append(tensor(entry[:3]))
        if len(entry) == 4:
            kwargs.update(entry[3] or {})
    for key, value in kwargs.items():
        if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str):
            kwargs[key] = tensor(value)
        else:
            kwargs[key] = _plain(value)
    unused = ("training", "mask", "name")
    return [found if len(found) > 1 else found[0]], {key: value for key, value in kwargs.items()
                                                     if key not in unused and value is not None}


def _plain(value, tensor=None):
    """A value of a description: numbers, short words, lists, and what Keras writes for tuples, slices and arrays."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and abs(value) <= WHOLE:
        return value
    if isinstance(value, str) and len(value) <= 200:
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, tensor) for item in value]
    if isinstance(value, dict):
        kind, config = value.get("class_name"), value.get("config")
        if kind is None and tensor:
            return {key: _plain(item, tensor) for key, item in value.items()}
        if kind == "__keras_tensor__" and tensor and isinstance(config, dict):
            history = config.get("keras_history")
            if isinstance(history, list) and len(history) == 3:
                return tensor(history)
        if kind in ("__tuple__", "TensorShape"):
            return tuple(_plain(value.get("items", []), tensor))
        if kind == "__ellipsis__":
            return Ellipsis
        if kind == "__slice__" and isinstance(config, dict):
            return slice(*(_plain(config.get(key)) for key in ("start", "stop", "step")))
        if kind in ("__numpy__", "__tensor__") and isinstance(config, dict):
            return _plain(config.get("value"))
        if value.get("type") == "ndarray":
            return _plain(value.get("value"))
        if kind is None and "items" in value:
            return _plain(value["items"])
    raise ValueError(f"{str(value)[:100]!r} is no plain value of a standard layer: refused")


def _activation(value, where):
    """An activation's name, or the layer that stands in for it."""
    if isinstance(value, dict):
        kind = _checked_class({**value, "registered_name": None}, where)
        if kind in ("ReLU", "LeakyReLU", "ELU", "PReLU", "Softmax"):
            return _layer(value, where)
        value = value.get("config") if kind == "function" else kind
    if value is not None and value not in ACTIVATIONS:
        _refuse(where, f"activation {str(value)[:80]!r}")
    return value


def _training_part(role, value, where):
    """Check a description of how the network was trained; it is not used."""
    name = value if isinstance(value, str) else _checked_class(value, where)
    known = TRAINING[role]
    if name not in known and name.replace("_", "").lower() not in {item.lower() for item in known}:
        _refuse(where, f"{role} {name[:80]!r}")
    if isinstance(value, dict):
        _inert(value.get("config"), where)


def _inert(value, where):
    """Refuse anything inside a part that is left out which names a class that could run code."""
    if isinstance(value, dict):
        if "class_name" in value and _checked_class(value, where) not in {"__numpy__", "__tuple__", "DTypePolicy",
                                                                          "SeedGenerator"}:
            _refuse(where, f"{value['class_name'][:80]!r}")
        for inner in value.values():
            _inert(inner, where)
    elif isinstance(value, list):
        for inner in value:
            _inert(inner, where)


def _layer(item, where):
    """One layer (or arithmetic function, or model) from its description."""
    kind = _checked_class(item, where)
    if kind in MODELS:
        return _inner_model(item, where)
    config = dict(_config(item, where))
    name = _name(config, where)
    # TensorFlow compiles no layer of another name, and to HDF5, which the artifacts are written in, a dot is no name.
    if not re.fullmatch(r"[A-Za-z0-9_.\\>-]+", name) or not name.strip("."):
        raise UserError(f"{where} has a layer named {name[:80]!r}, which TensorFlow does not compile: rename it to letters, "
                        "digits, _, - and . and save the model again")
    # Without a module (`.h5`), an addition written `x + y` differs from the layer Add by having no layer's options.
    module = item.get("module")
    if kind in OPS and (module.startswith("keras.src.ops") if module else not {"trainable", "dtype"} & set(config)):
        return _operation(OPS[kind], name, {key: _plain(value) for key, value in config.items()
                                            if key not in ("name", "dtype") and value is not None})
    if kind == "TFOpLambda" and config.get("function") in TENSORFLOW_OPS:
        function = TENSORFLOW_OPS[config["function"]]
        return _operation(lambda x, y=None: function(x) if y is None else function(x, y), name, {})
    if kind in AUGMENTATIONS:
        _inert(config, where)
        return layers.Identity(name=name)
    if kind not in LAYERS:
        _refuse(where, f"layer {kind[:80]!r} ({name!r})")
    make = LAYERS[kind]
    known = set(inspect.signature(make.__init__).parameters) - {"self", "kwargs"}
    options = {}
    for key, value in config.items():
        role = key.rsplit("_", 1)[-1]
        if key in ("name", "trainable", "dtype", "seed"):
            _inert(value, where)
        elif role in TRAINING:
            if value is not None:
                _training_part(role, value, where)
            if role == "initializer" and key in known:
                options[key] = "zeros"
        elif key == "activation":
            options[key] = _activation(value, where)
        elif key in OTHER_VERSIONS and (key not in known or not value):
            _inert(value, where)
        elif key in ("data_format",):
            if value not in (None, "channels_last"):
                raise UserError(f"{where}: layer {name!r} has its channels first: convert the model to channels last")
        elif kind == "LeakyReLU" and key == "alpha":        # its name in Keras 2
            options["negative_slope"] = _plain(value)
        elif key in known:
            options[key] = _plain(value)
        elif value not in (None, False) and (key, value) != ("groups", 1):
            _refuse(where, f"option {key[:80]!r} of layer {kind} ({name!r})")
    if kind == "BatchNormalization" and config.get("renorm"):
        _refuse(where, f"batch renormalization in {name!r}")
    if isinstance(options.get("axis"), (list, tuple)) and len(options["axis"]) == 1 and kind != "Normalization":
        options["axis"] = options["axis"][0]
    widest = options.get("dilation_rate") or 1
    if any(not isinstance(rate, int) or rate > 256 for rate in (
            widest if isinstance(widest, (list, tuple)) else [widest])):
        _refuse(where, f"dilation {str(widest)[:40]} of layer {name!r}")
    layer = make(**options, name=name)
    if config.get("trainable") is False:        # the order of weights in old files depends on it
        layer.trainable = False
    return layer


def _operation(function, name, options):
    def call(*args, **kwargs):
        output = function(*args, **{**options, **kwargs})
        output._keras_history.operation.name = name         # the automatic name depends on what was loaded before
        return output
    return call


def _inner_model(item, where):
    if item["class_name"] != "Sequential":
        model = _functional(item, where)
    else:
        name, described, config = _model_parts(item, where)
        given = _shape(described[0])
        first = [keras.Input(batch_shape=(None, *given[1:]))] if given else []
        model = keras.Sequential([*first, *_stack(described, where)], name=name)
    if isinstance(item["config"], dict) and item["config"].get("trainable") is False:
        model.trainable = False
    return model
