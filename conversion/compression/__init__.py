"""Quantized copies for inference engines through llm-compressor, calibrated on images and text."""
