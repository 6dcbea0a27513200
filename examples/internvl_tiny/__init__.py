"""InternVL-tiny: the tasks, tokenizer and scores behind the small checkpoint that ships with this package.

`drawing` makes the pictures, `tasks` asks about them, `tokenizer` builds the vocabulary, `metrics` marks the answers.
Nothing here trains or loads a model.
"""
