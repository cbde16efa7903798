"""Drafters as files: reading (`reader`, `tensor_files`, `formats`), `convert`, `inspect`, cards (`card`) and the Hub (`push`).

Imports: utils, hub, configuration, calibration, adapters.
"""
