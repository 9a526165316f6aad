"""The small autoencoder of the quickstart, and training one: `megafusion train-vae`."""
