"""Throughput: operators, inference and whole training steps beside their rivals."""
