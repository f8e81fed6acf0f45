"""Loaders: each puts an image into guest memory and says how the boot vCPU enters it."""
