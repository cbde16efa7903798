"""Training of drafters: response rows in, trained drafter out. Imports: utils, targets, models, adapters, decoding."""
