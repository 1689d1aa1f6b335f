"""Maps of the image regions that a model's output depends on, with sanity checks, figures and a page.

The input is a classifier and images; the output is occlusion and Grad-CAM maps as arrays, figures and a page. A map
shows what a model reacts to, not whether the model is right.
"""
