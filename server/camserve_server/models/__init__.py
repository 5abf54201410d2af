"""Models: sources, layers, folding, and preprocessing of images."""
