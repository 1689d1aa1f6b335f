"""Maps of what the output of a model depends on, with their sanity checks, figures and page.

What enters are a classifier and images. What leaves are occlusion and Grad-CAM maps as arrays, figures and a page. A map
shows what a model reacts to, not whether the model is right.
"""
