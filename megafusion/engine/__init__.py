"""DeepSpeed around this rank's stage of the model. No other package knows DeepSpeed's internals."""

import warnings

# DeepSpeed calls functions that torch deprecates; a user cannot act on that.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
