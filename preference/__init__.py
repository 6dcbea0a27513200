"""Building preference pairs from a model's own answers, as MMPR was built."""
