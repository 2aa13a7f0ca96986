"""The mathematics and the file handling that the six scripts share, one idea a file."""

import os

# Before TensorFlow is loaded. oneDNN's convolutions are about twice as fast per core where TensorFlow leaves them off
# by default (processors without AVX-512, measured on an AMD EPYC); notes of its start-up are of no use to a reader.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Before OpenCV is: a picture of a few kilobytes may unpack to gigabytes. 8,192 by 8,192 pixels are the most.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 26))
