import llm_core.signals  # noqa: F401  first of all: it imports NumPy with the stop signals blocked
