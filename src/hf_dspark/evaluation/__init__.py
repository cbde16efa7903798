"""Measurement: prompt files in, acceptance and speed out, as records that carry machine, versions and seed."""
