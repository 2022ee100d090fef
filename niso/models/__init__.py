"""Networks as nnx modules: they know shapes, neither losses nor data."""
