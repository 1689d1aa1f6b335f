"""A trained model over HTTP: a page, an interface of its own, and that of KServe."""
