"""Per-example gradients, exact for any module, and their products."""
