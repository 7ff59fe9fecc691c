"""Parameter-efficient tuning: adapters, applied to a model from outside. The base is frozen and never changes."""
