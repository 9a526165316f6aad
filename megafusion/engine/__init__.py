"""DeepSpeed around this rank's stage of the model. No other package knows DeepSpeed's internals."""

import megafusion.parallel  # noqa: F401  (chooses DeepSpeed's accelerator, before DeepSpeed is imported)
