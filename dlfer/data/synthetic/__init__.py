"""Drawn faces and scenes, so that everything can be tried without data.

What enters is a seed and a number of images. What leaves is a `DataBundle` like that of any other source, marked as drawn.
"""
