"""Figures and self-contained pages made from the files of a run: no TensorFlow, no network."""
