"""An example of a plugin package for sdxl-train."""
