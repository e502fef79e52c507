"""From a model to its graph of ATen calls."""
