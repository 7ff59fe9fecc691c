"""Measures of a model on data: perplexity, and EM/F1 of its answers; `evals.run` is run_mode eval."""
