"""The demo: the whole pipeline on generated or own images."""
