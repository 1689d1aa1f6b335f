"""Images, labels and splits: readers, protocols, duplicates, balancing, and the batches that training takes.

What enters is the data section of an experiment. What leaves is a `DataBundle` of uint8 images in their native size,
with what was read, left out and why, or batches in the input size of a network.
"""
