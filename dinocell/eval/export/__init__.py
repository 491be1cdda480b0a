"""Writing segmentations: label images, tables, outlines, COCO annotations."""
