"""Accuracy: the methods on the same encoders, batches and budget, and the paper's studies."""
