"""Training on transformers' Trainer: batches (`collation`), settings (`arguments`), an exact loss (`trainer`)."""
