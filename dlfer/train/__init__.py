"""Resumable training of one stage on one or more devices, and of boosted trees.

The package takes a network, a data bundle and the settings of a stage, and produces trained weights, a history of
epochs and checkpoints. Nothing here evaluates a model on test images.
"""
