"""Gradients of a training set, projected, kept in a folder, and asked again and again."""
