"""Datasets in one HDF5 format: `x_train`, `x_test` uint8 N×H×W×C (RGB), `y_train`, `y_test` integer labels."""
