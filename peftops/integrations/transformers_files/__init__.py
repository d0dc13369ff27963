"""The files of a transformers checkpoint: what they hold, and how others are made of them."""
