"""Generated faces and scenes, with which everything can be tried without data.

The input is a seed and the number of images. The output is a `DataBundle` like that of any other source, with a note.
"""
