"""Loaded by a fork server only: its children have everything imported, loaded and built."""

from tests.pipeline.extraction_process import prepare

prepare()
