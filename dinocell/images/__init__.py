"""Reading and writing images, locally and remotely."""
