"""One decoding loop for every batch size: state, draft, verify, commit; sampling, the user's rules, n-gram copying, statistics, profiler.

Imports: utils, cache, targets, budgets, calibration, adapters, models.
"""
