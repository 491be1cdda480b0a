"""Recipes, and the function that loads one as a typed, frozen configuration."""
