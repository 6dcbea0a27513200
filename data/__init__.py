"""Training data: annotation files of any format and their mixtures to typed records, records to model inputs.

`mixture` and `records` read rows, `pairs` those with two answers, `media` and `video` their pictures and frames,
`features` makes the inputs of one row, `dataset` and `preference_dataset` those of a run with their lengths measured
beforehand. Shuffling, batching and weighing is `training`.
"""
