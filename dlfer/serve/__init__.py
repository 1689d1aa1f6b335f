"""The HTTP server: a web page, /v1/predict, and the Open Inference Protocol.

Requests contain pictures or arrays; responses contain the probabilities of each face. This package implements limits,
batching and access control; finding and predicting faces is implemented in `predict`.
"""
