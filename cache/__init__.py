"""The feature cache: an HDF5 file format, its writer, reader, merge and verify. Without torch."""
