"""From an image to labels: tiling, post-processing, batch segmentation."""
