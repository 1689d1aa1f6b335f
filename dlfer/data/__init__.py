"""Images, labels and splits: readers, protocols, duplicates, balancing, and the batches that training takes.

The input is the data section of an experiment. The output is a `DataBundle` of uint8 images in their native size with
the counts of what was read and left out, or the batches of an epoch.
"""
