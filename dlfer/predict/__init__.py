"""Prediction for pictures, folders, videos and cameras with a trained model.

What enters are files or frames. What leaves is one row per face: box, label, probabilities. The engines that compute
(Keras, ONNX Runtime, OpenVINO, LiteRT) are chosen here.
"""
