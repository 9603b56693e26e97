"""Loaded by a fork server, so that its children have everything imported, loaded and built."""

from tests.pipeline.extraction_process import prepare

prepare()
