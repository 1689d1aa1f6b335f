"""Backbones, the networks and tree ensembles built on them, and the folder that a trained model is saved in.

What enters are the model section of an experiment and weights. What leaves is a Keras network to train, or a `Classifier`
that maps images to probabilities.
"""
