"""`dinocell demo`: the whole road, from images to scores, on generated fields or on the user's own images."""
