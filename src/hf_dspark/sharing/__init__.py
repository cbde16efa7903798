"""Drafters on the Hub: cards, push and pull. Knows files, result records and huggingface_hub; knows no decoding and no training loop."""
