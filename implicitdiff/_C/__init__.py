"""The compiled optimizer steps will be built into this package; the library has none yet and needs none."""
