"""Mask R-CNN on images in memory: no cluster, no storage; every function can be called in a notebook."""
