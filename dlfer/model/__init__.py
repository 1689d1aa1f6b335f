"""Backbones, the networks and tree ensembles built on them, and the artifact folder in which a trained model is saved.

The package turns the `model` section of an experiment and weights into a Keras network to train, or into a
`Classifier` that maps images to probabilities.
"""
