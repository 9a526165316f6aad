"""The small default tokenizer, and the training of such tokenizers."""
