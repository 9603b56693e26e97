"""Where photos lie: in a folder, in tars, in Parquet files, or in a remote store."""
