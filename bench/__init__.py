"""Throughput beside the best eager forms, and accuracy beside the paper's other methods. Nothing in mla_fast imports this."""
