"""Measurements behind results/README.md: zoos of models, the tables made of their scans, and speed."""
