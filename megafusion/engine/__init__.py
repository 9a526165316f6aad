"""DeepSpeed around this rank's stage of the model. No other package knows DeepSpeed's internals."""
