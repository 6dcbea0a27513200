"""Measuring InternVL models: metrics, verifiers, engines that answer, and the evaluator over local files."""
