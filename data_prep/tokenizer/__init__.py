"""The small default tokenizer and its training."""
