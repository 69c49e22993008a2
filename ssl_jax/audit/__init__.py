"""Choosing transforms: what they do to lesions (`lesions`), and what an encoder ignores (`invariance`)."""
