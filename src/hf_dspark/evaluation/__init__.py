"""What a user measures: acceptance and speed over prompts, throughput under load, calibration, and the plots of them.

Imports: decoding, calibration, training (the reader of prompt files) and what lies below them.
"""
