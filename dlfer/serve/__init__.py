"""The HTTP server: a page for people, /v1/predict, and the Open Inference Protocol.

Requests carry pictures or arrays; responses carry probabilities for each face. Limits, batching and access control belong to
this package; decoding pictures and predicting belong to `predict`.
"""
