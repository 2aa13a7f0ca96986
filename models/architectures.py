"""The networks of the paper (supplementary, architectures), once each; all return logits.

Inputs are float32 N×H×W×C, already scaled as the dataset's row says. Layer names are those of the published
checkpoints where Keras allows them: a checkpoint's `conv1/weight` is the kernel of layer `conv1`.
"""

from keras import Input, Model, layers


def build(row):
    """The untrained network of a `utils.datasets.Dataset` row, named after the dataset."""
    return globals()[row.network](row.shape, row.labels, name=row.name, **row.network_options)


def convnet(shape, labels, widths, hidden, name):
    """Pairs of 3×3 convolutions with a pool after each, then `full` and `class` (MNIST, GTSRB, signs).

    widths: the channels of each convolution, a tuple a stage; hidden: units of `full`.
    """
    x = inputs = Input(shape)
    number = 0
    for stage, channels in enumerate(widths, 1):
        for width in channels:
            number += 1
            x = layers.Conv2D(width, 3, padding="same", activation="relu", name=f"conv{number}")(x)
        x = layers.MaxPooling2D(2, padding="same", name=f"pool{stage}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(hidden, activation="relu", name="full")(x)
    x = layers.Dropout(0.5, name="dropout")(x)
    return Model(inputs, layers.Dense(labels, name="class")(x), name=name)


def resnet18(shape, labels, name):
    """ResNet-18 for 32×32 images: conv 64, eight basic blocks, global average pool, `fc` (CIFAR-10)."""
    def convolve(x, width, kernel, stride, label):
        x = layers.Conv2D(width, kernel, stride, padding="same", use_bias=False, name=f"{label}_conv")(x)
        return layers.BatchNormalization(name=f"{label}_norm")(x)

    inputs = Input(shape)
    x = layers.ReLU(name="conv1_relu")(convolve(inputs, 64, 3, 1, "conv1"))
    for block, width in enumerate((64, 64, 128, 128, 256, 256, 512, 512), 1):
        stride = 2 if width != x.shape[-1] else 1
        shortcut = convolve(x, width, 1, stride, f"block{block}_shortcut") if stride == 2 else x
        y = layers.ReLU(name=f"block{block}_relu")(convolve(x, width, 3, stride, f"block{block}_1"))
        y = layers.Add(name=f"block{block}_add")([convolve(y, width, 3, 1, f"block{block}_2"), shortcut])
        x = layers.ReLU(name=f"block{block}_out")(y)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return Model(inputs, layers.Dense(labels, name="fc")(x), name=name)


def deepid(shape, labels, name):
    """DeepID: three strided convolutions, then `fc1` beside `conv4` and `fc2`, added, then `class` (YouTube-Face)."""
    x = inputs = Input(shape)
    for number, (width, kernel) in enumerate(((20, 4), (40, 3), (60, 3)), 1):
        x = layers.Conv2D(width, kernel, 2, padding="same", activation="relu", name=f"conv{number}")(x)
        x = layers.MaxPooling2D(2, padding="same", name=f"pool{number}")(x)
    fc1 = layers.Dense(160, name="fc1")(layers.Flatten(name="flatten1")(x))
    y = layers.Conv2D(80, 2, padding="same", activation="relu", name="conv4")(x)
    fc2 = layers.Dense(160, name="fc2")(layers.Flatten(name="flatten2")(y))
    x = layers.ReLU(name="add")(layers.Add(name="sum")([fc1, fc2]))
    x = layers.Dropout(0.5, name="dropout")(x)
    return Model(inputs, layers.Dense(labels, name="class")(x), name=name)


def vgg16(shape, labels, name):
    """VGG-16: thirteen 3×3 convolutions in five stages, then `fc6`, `fc7`, `fc8` (VGG-Face)."""
    x = inputs = Input(shape)
    for stage, (width, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
        for number in range(1, count + 1):
            x = layers.Conv2D(width, 3, padding="same", activation="relu", name=f"conv{stage}_{number}")(x)
        x = layers.MaxPooling2D(2, padding="same", name=f"pool{stage}")(x)
    x = layers.Flatten(name="flatten")(x)
    for number in (6, 7):
        x = layers.Dense(4096, activation="relu", name=f"fc{number}")(x)
        x = layers.Dropout(0.5, name=f"dropout{number}")(x)
    return Model(inputs, layers.Dense(labels, name="fc8")(x), name=name)
