"""Rows of text to batches of tokens: files and hub, chat templates, masks, packing, the input pipeline."""
