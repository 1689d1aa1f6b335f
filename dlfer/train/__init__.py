"""The training of one stage on one or more devices, resumable, and of boosted trees.

What enters are a network, a data bundle and the keys of a stage. What leaves are trained weights, a history of epochs and
checkpoints. Nothing here evaluates a model on test images.
"""
