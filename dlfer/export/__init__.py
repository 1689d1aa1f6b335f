"""Trained models as folders that other programs can use, and as shipped models.

What enters is a classifier. What leaves is one folder per format, which is compared with the original on images before
it is kept, or a small copy of the model with its card.
"""
