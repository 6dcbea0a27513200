"""An OpenAI-compatible server for one model: that of transformers, around this package's model."""
