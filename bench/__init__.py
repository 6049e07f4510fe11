"""Benchmarks: every op against what a user would otherwise call, in speed and in error.

    python -m fastdistill.bench group_norm_silu --mode forward --shapes sd15,vae

One file per op (`bench/<op>.py`, a `Benchmark` each); what is shared lies beside them:
benchmark (what an op file supplies) · providers (whom is measured) · modes (which step) · timing · accuracy · runner ·
rows · report · environment · cli.
"""
