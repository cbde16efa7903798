"""The target as decoding sees it: ragged passes over rows of different length, and taps. Imports: utils, cache."""
