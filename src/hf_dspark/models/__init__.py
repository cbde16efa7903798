"""The drafter: backbone, heads, draft vocabulary, the target's embeddings, loading and saving.

Imports: utils, hub, configuration_dspark, cache, calibration, adapters, checkpoints.
"""
