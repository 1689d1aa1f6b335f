"""Prediction for pictures, folders, videos and cameras with a trained model.

The inputs are files or frames; the output is one row per face with box, label and probabilities. The inference engine
(Keras, ONNX Runtime, OpenVINO or LiteRT) is also chosen here.
"""
