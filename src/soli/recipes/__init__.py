"""Recipes of training runs, one folder each, and the corpus step that three of them name."""
