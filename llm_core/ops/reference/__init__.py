"""Plain MindSpore implementations: the oracle of every other backend."""
