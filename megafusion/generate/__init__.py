"""Text and images from a trained model: key-value cache, decoder, TransfusionPipeline."""
