"""The HTTP service: a page for people, /v1/predict, and the Open Inference Protocol.

What enters are requests with pictures or arrays. What leaves are probabilities per face. Limits, batching of requests and
authorisation belong here; reading pictures and predicting are those of `predict`.
"""
