"""Training data: rows of a file to typed records (`records`), records to model inputs (`dataset`).

Nothing here shuffles, batches or weighs samples; that is the work of `training`.
"""
