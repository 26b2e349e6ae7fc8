"""Throughput against the reference implementation and the best eager forms. Nothing in mla_fast imports this."""
