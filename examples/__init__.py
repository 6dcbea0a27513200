"""Worked examples: small programs that use the package from end to end."""
