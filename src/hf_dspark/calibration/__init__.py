"""What confidences mean: Sequential Temperature Scaling, its online variant, the fits of n-gram copying, and `calibration.json`.

Imports: utils, hub, configuration_dspark, budgets.
"""
