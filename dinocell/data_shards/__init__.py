"""Images to training data: reading, tiling, shards, labelled sets, distance maps, synthetic fields."""
