"""The feature cache: one HDF5 file format, its writer, reader, merge and verify. No torch."""
