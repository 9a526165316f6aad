"""Text models of Hugging Face: what their configurations and tensors are called here, in and out."""
