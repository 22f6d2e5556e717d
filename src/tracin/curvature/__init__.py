"""Curvature of a loss: products with it, and solutions of damped systems."""
