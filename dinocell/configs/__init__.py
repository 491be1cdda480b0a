"""Recipes, and the one function that turns a recipe into a typed, frozen configuration."""
