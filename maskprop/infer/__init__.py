"""From a graph and masks to facts."""
