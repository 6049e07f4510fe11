"""Benchmarks: every op against what a user would otherwise call, in speed and in error.

    python -m fastdistill.bench group_norm_silu --mode forward --shapes sd15,vae

One file per op (`bench/<op>.py`, a `Benchmark` each), `engine` and `training` for whole programs. What is shared lies
beside them: benchmark (what an op file supplies) · providers, peers (whom is measured) · modes (which step) · timing
(CPU), gpu_timing, gpu · accuracy · usage (memory, launches) · roofline, devices, measure (limits) · runner, execution ·
rows (results files) · report, plots, document · changes (against earlier results) · predict · profiling · environment ·
cli. `test_suite/` holds the same cases for pytest-benchmark; `results/` what was measured where.
"""
