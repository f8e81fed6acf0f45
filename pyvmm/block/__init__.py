"""Disk images: raw files, block devices, copy-on-write overlays."""
