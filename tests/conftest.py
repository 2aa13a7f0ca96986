"""Loads `utils` before any test loads TensorFlow, as the scripts do: it chooses how TensorFlow computes."""

import utils  # noqa: F401
