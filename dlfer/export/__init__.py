"""Export of trained models to formats for other programs, and shipping of models.

An export is one folder per format, which is compared with the original classifier on images before it is kept. A
shipped model is a small copy of a trained model with its card.
"""
